"""The bandits as learning tasks: on-policy rollouts, GRPO's loss, exact expected reward.

`bandit`: softmax policy over 10 arms, the best pays with probability 0.9, the others less. `bandit100`: 100 arms.
`contextual`: 16 contexts, 10 arms, one right answer each, a small MLP; expected reward is pass@1.
`steep`: the same contexts, a linear policy on features whose scales differ 30 times, and a KL term that holds it back:
the optimum lies inside, in a valley, and the steepest feature bounds the learning rate of plain gradient descent.
The problems themselves are `gxpo_toy_tasks.tasks.bandits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gxpo_toy_tasks.engine import Draws, Params
from gxpo_toy_tasks.tasks.bandits import Bandit, ContextualBandit
from gxpo_toy_tasks.tasks.policy import PolicyTask, choose


class BanditTask(PolicyTask):
    """Softmax over arms; a parameter an arm."""

    groups, responses = 8, 16

    def __init__(self, arms: int = 10) -> None:
        self.name = "bandit" if arms == 10 else f"bandit{arms}"
        self.problem = Bandit(means=tuple(np.linspace(0.1, 0.9, arms)))
        self.means = torch.from_numpy(self.problem.chances[0])
        self.shapes = self.problem.shapes

    def initial(self, seeds: Sequence[int]) -> Params:
        return {"logits": torch.stack([torch.from_numpy(self.problem.initial(seed)["logits"]) for seed in seeds])}

    def prompts(self, draws: Draws) -> Tensor:
        return draws.integers(1, self.groups)

    def sample(self, theta: Params, prompts: Tensor, draws: Draws) -> Tensor:
        log_policy = theta["logits"].log_softmax(dim=-1)[:, None, None, :]
        return choose(log_policy, draws.uniform(self.groups, self.responses))[..., None]

    def logps(self, theta: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        log_policy = theta["logits"].log_softmax(dim=-1)
        return log_policy.gather(1, actions.flatten(1)).view(actions.shape)

    def rewards(self, prompts: Tensor, actions: Tensor, draws: Draws) -> Tensor:
        return draws.uniform(*actions.shape[1:3]) < self.means.to(actions.device)[actions[..., 0]]

    def accuracy(self, theta: Params) -> Tensor:
        return theta["logits"].softmax(dim=-1) @ self.means.to(theta["logits"])


class ContextualTask(PolicyTask):
    """One right arm a context; a step asks every context, 64 times each."""

    name, responses, width = "contextual", 64, 32

    def __init__(self, contexts: int = 16, arms: int = 10) -> None:
        self.groups = contexts
        self.problem = ContextualBandit(contexts=contexts, arms=arms, features=8)
        self.inputs = torch.from_numpy(self.problem.inputs.copy())
        self.answers = torch.from_numpy(self.problem.answers.copy())
        features = self.inputs.shape[1]
        self.shapes = {"w1": (features, self.width), "b1": (self.width,), "w2": (self.width, arms), "b2": (arms,)}

    def initial(self, seeds: Sequence[int]) -> Params:
        """Normal weights of variance 1 / fan-in, the last layer's a tenth of that; biases zero."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            for name, shape in self.shapes.items():
                scale = {"w1": shape[0] ** -0.5, "w2": 0.1 * shape[0] ** -0.5}.get(name, 0.0)
                rows[name].append(scale * torch.randn(shape, generator=rng, dtype=torch.float64))
        return {name: torch.stack(made) for name, made in rows.items()}

    def log_policy(self, theta: Params) -> Tensor:
        """(runs, contexts, arms)"""
        hidden = torch.tanh(self.inputs.to(theta["w1"]) @ theta["w1"] + theta["b1"][:, None])
        return (hidden @ theta["w2"] + theta["b2"][:, None]).log_softmax(dim=-1)

    def prompts(self, draws: Draws) -> Tensor:
        return torch.arange(self.groups).expand(len(draws.seeds), -1).to(draws.device)

    def sample(self, theta: Params, prompts: Tensor, draws: Draws) -> Tensor:
        return choose(self.log_policy(theta)[:, :, None], draws.uniform(self.groups, self.responses))[..., None]

    def logps(self, theta: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        return self.log_policy(theta).gather(2, actions[..., 0])[..., None]  # prompts are all contexts, in order

    def rewards(self, prompts: Tensor, actions: Tensor, draws: Draws) -> Tensor:
        return actions[..., 0] == self.answers.to(actions.device)[prompts][..., None]

    def accuracy(self, theta: Params) -> Tensor:
        log_policy = self.log_policy(theta)
        at = self.answers.to(log_policy.device)[None, :, None].expand(len(log_policy), -1, -1)
        return log_policy.gather(2, at).exp().mean(dim=(1, 2))


class SteepTask(ContextualTask):
    """A linear softmax policy; feature i is scaled by condition^(-i / (features - 1))."""

    name, responses = "steep", 256

    def __init__(self, condition: float = 30.0, beta: float = 0.3) -> None:
        super().__init__()
        self.beta = beta
        features, arms = self.inputs.shape[1], self.shapes["b2"][0]
        self.inputs = self.inputs * torch.logspace(0, -math.log10(condition), features, dtype=torch.float64)
        self.shapes = {"w": (features, arms), "b": (arms,)}

    def initial(self, seeds: Sequence[int]) -> Params:
        """Normal weights of standard deviation 0.1; no bias."""
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [0.1 * torch.randn(self.shapes["w"], generator=rng, dtype=torch.float64) for rng in rngs]
        return {"w": torch.stack(rows), "b": torch.zeros(len(seeds), *self.shapes["b"], dtype=torch.float64)}

    def log_policy(self, theta: Params) -> Tensor:
        return (self.inputs.to(theta["w"]) @ theta["w"] + theta["b"][:, None]).log_softmax(dim=-1)
