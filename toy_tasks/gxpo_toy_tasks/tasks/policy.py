"""What the learning tasks share: rollouts in groups, GRPO's advantages and loss, for many runs at once.

A task says how its policy samples and what log-probabilities it gives; the loss is `gxpo_reference.grpo_loss`, the one
for real models. Old log-probabilities are stored once a step, at theta0; the reference policy of the KL term is the one
that training started from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gxpo_reference.grpo_loss import group_advantages, grpo_loss
from gxpo_toy_tasks.engine import Draws, Params


@dataclass(frozen=True)
class Batch:
    """One step's rollouts, for every run: `groups` prompts, `responses` to each, `tokens` long."""

    prompts: Tensor  # (runs, groups): which prompt
    actions: Tensor  # (runs, groups, responses, tokens)
    old_logps: Tensor  # of `actions`, in nats, at theta0
    ref_logps: Tensor
    advantages: Tensor  # (runs, groups, responses)
    entropy: Tensor  # (runs,): estimated from the samples, nats a token


class PolicyTask(ABC):
    """A policy with a verifiable reward. Implements engine.Task."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    groups: int
    responses: int
    clip = 0.2
    beta = 1e-3

    @abstractmethod
    def initial(self, seeds: Sequence[int]) -> Params:
        """As engine.Task has it."""

    @abstractmethod
    def prompts(self, draws: Draws) -> Tensor:
        """(runs, groups)"""

    @abstractmethod
    def sample(self, theta: Params, prompts: Tensor, draws: Draws) -> Tensor:
        """(runs, groups, responses, tokens): what the policy answers."""

    @abstractmethod
    def logps(self, theta: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        """Log-probabilities of `actions`, token by token, in their shape."""

    @abstractmethod
    def rewards(self, prompts: Tensor, actions: Tensor, draws: Draws) -> Tensor:
        """(runs, groups, responses)"""

    @abstractmethod
    def accuracy(self, theta: Params) -> Tensor:
        """As engine.Task has it."""

    def rollouts(self, theta: Params, reference: Params, draws: Draws) -> Batch:
        prompts = self.prompts(draws)
        actions = self.sample(theta, prompts, draws)
        old_logps = self.logps(theta, prompts, actions)
        rewards = self.rewards(prompts, actions, draws).to(old_logps.dtype)
        advantages = group_advantages(rewards.flatten(0, 1)).view_as(rewards)
        ref_logps = self.logps(reference, prompts, actions)
        return Batch(prompts, actions, old_logps, ref_logps, advantages, -old_logps.flatten(1).mean(dim=1))

    def loss(self, theta: Params, batch: Batch) -> Tensor:
        logps = self.logps(theta, batch.prompts, batch.actions)
        runs = len(logps)
        # Every run has as many responses, so the mean over all of them is the mean of the runs' losses.
        rows = (t.flatten(0, 2) for t in (logps, batch.old_logps, batch.advantages, batch.ref_logps))
        logps, old_logps, advantages, ref_logps = rows
        loss, _ = grpo_loss(logps, old_logps, advantages, clip=self.clip, ref_logps=ref_logps, beta=self.beta)
        return runs * loss


def choose(log_policy: Tensor, u: Tensor) -> Tensor:
    """Actions by inverse transform: the first whose cumulated probability exceeds u. log_policy: (..., arms)."""
    below = log_policy.exp().cumsum(dim=-1) <= u[..., None]
    return below.sum(dim=-1).clamp(max=log_policy.shape[-1] - 1)
