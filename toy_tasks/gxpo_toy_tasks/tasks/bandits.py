"""Tiny policy bandits under the clipped GRPO loss, with gradients in closed form.

A softmax policy picks one of a few arms: `Bandit` in one state, `ContextualBandit` from a few fixed feature vectors.
A step's rollouts are fixed by seed and step number. They come from a uniform behaviour policy, never from the
parameters, so that a rounding error in a port can move a probability but never change which action was sampled.

    bandit = Bandit(seed=0)
    theta = bandit.initial()
    for step in range(20):
        gradient = bandit.objective(step, theta)       # old log-probabilities fixed here, at theta0
        loss, grads = gradient(theta)                  # ask it anywhere, as often as you like
        theta = {name: theta[name] - 1.0 * grads[name] for name in theta}
    bandit.reward(theta)                               # exact expected reward, no sampling

What uniform rollouts do, with beta = 0: the gradient at theta0 is the same whatever theta0 is, up to rounding, because
a group's advantages sum to zero and the -pi of the softmax gradient drops out. It never fades, and is no policy
gradient: `ContextualBandit` climbs, then settles with some contexts wrong. Enough to compare ports. To compare
learners, set on_policy=True: each response is weighted by pi_theta0 / uniform, fixed numbers again, and the gradient
at theta0 becomes the policy gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Params = dict[str, np.ndarray]
Gradient = Callable[[Mapping[str, np.ndarray]], tuple[float, Params]]

# One random stream per purpose, so that asking for one never shifts another.
_TASK, _INITIAL, _ROLLOUTS = 0, 1, 2


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """GRPO's advantages, (r - mean) / (std + 1e-4) within each group. rewards and result: (groups, responses).

    std is the sample one (divided by responses - 1) and the constant is 1e-4, as in TRL's GRPOTrainer (torch.std),
    because that is what most published runs used; DeepSeekMath (arXiv 2402.03300, section 4.1.2) leaves both open.
    `gxpo_reference.grpo_loss` does the same. All-equal rewards give exact zeros. ValueError for another shape.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must have shape (groups, responses), responses at least 2, got {rewards.shape}")
    # The mean of three 0.1 is not 0.1 in floating point; measured from the first reward, equal rewards are exact.
    centred = rewards - rewards[:, :1]
    centred = centred - centred.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def clipped_loss(
    logp: np.ndarray,
    old_logp: np.ndarray,
    advantages: np.ndarray,
    clip: float,
    ref_logp: np.ndarray | None = None,
    beta: float = 0.0,
) -> tuple[float, np.ndarray]:
    """The GRPO loss of one-token responses and its derivative by each log-probability.

        -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + beta (exp(d) - d - 1),   averaged over all responses,
        ratio = exp(logp - old_logp),   d = ref_logp - logp   (the k3 estimator; DeepSeekMath, equations 3 and 4)

    Arrays: one shape; log-probabilities in nats. Returns (loss, dloss/dlogp of that shape). The derivative is zero
    where the clipped branch is the smaller one, as autograd through torch.min and torch.clamp has it.
    """
    ratio = np.exp(logp - old_logp)
    plain = ratio * advantages
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantages
    value = -np.minimum(plain, clipped)
    slope = np.where(plain > clipped, 0.0, -plain)  # d ratio / d logp = ratio; this way round nan stays nan
    if ref_logp is not None:
        apart = ref_logp - logp
        value = value + beta * (np.expm1(apart) - apart)  # expm1: exp(d) - d - 1 loses d^2 / 2 near d = 0
        slope = slope - beta * np.expm1(apart)
    return float(value.mean()), slope / value.size


@dataclass(frozen=True, eq=False)
class Rollouts:
    """One step's fixed batch: contexts (groups,), actions, rewards and advantages (groups, responses)."""

    contexts: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _SoftmaxPolicy(ABC):
    """What both bandits share: rollouts, loss and reward, given logits and each action's chance of reward 1.

    groups, responses: rollouts a step, `responses` of them to each of `groups` prompts. clip: the ratio's range is
    [1 - clip, 1 + clip]. beta: weight of the k3 KL estimate against the policy of `initial()`. on_policy: multiply
    each advantage by pi_theta0 / uniform, so that at theta0 the expected gradient is that of on-policy rollouts.
    seed: fixes all else. Raises ValueError for a value out of bounds.
    """

    groups: int = 8
    responses: int = 8
    clip: float = 0.2
    beta: float = 0.0
    on_policy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("groups", self.groups, 1)
        _at_least("responses", self.responses, 2)
        _at_least("beta", self.beta, 0)
        _at_least("seed", self.seed, 0)
        if not self.clip > 0:
            raise ValueError(f"clip must be greater than 0, got {self.clip}")

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' names and shapes."""

    @property
    @abstractmethod
    def chances(self) -> np.ndarray:
        """(contexts, arms): the probability that an action is rewarded with 1 rather than 0."""

    @abstractmethod
    def _logits(self, params: Params) -> np.ndarray:
        """(contexts, arms) from parameters of the right shapes."""

    @abstractmethod
    def _chain(self, dlogits: np.ndarray) -> Params:
        """The parameters' gradient from the logits' (contexts, arms)."""

    def initial(self, seed: int | None = None) -> Params:
        """Small random parameters (standard deviation 0.1). Without a seed of its own: the reference policy's."""
        rng = _stream(_INITIAL, self.seed if seed is None else seed)
        return {name: 0.1 * rng.standard_normal(shape) for name, shape in self.shapes.items()}

    @np.errstate(over="ignore", invalid="ignore")
    def log_policy(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """(contexts, arms): log-probabilities in nats. ValueError if names or shapes are not those of `shapes`."""
        got = {name: np.shape(value) for name, value in params.items()}
        if got != self.shapes:
            raise ValueError(f"params must have the shapes {self.shapes}, got {got}")
        logits = self._logits({name: np.asarray(value, dtype=np.float64) for name, value in params.items()})
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def reward(self, params: Mapping[str, np.ndarray]) -> float:
        """Exact expected reward in [0, 1], the mean over contexts (equally likely)."""
        return float((np.exp(self.log_policy(params)) * self.chances).sum(axis=1).mean())

    def rollouts(self, step: int) -> Rollouts:
        """The batch of outer step `step`, the same on every call."""
        rng = _stream(_ROLLOUTS, self.seed, step)
        contexts = rng.integers(self.chances.shape[0], size=self.groups)
        actions = rng.integers(self.chances.shape[1], size=(self.groups, self.responses))
        rewards = (rng.random(actions.shape) < self.chances[contexts[:, None], actions]).astype(np.float64)
        return Rollouts(contexts, actions, rewards, group_advantages(rewards))

    def ratios(self, step: int, theta0: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]) -> np.ndarray:
        """(groups, responses): pi / pi_old at `params`. The gradient jumps where one crosses 1 - clip or 1 + clip."""
        batch = self.rollouts(step)
        moved = self.log_policy(params) - self.log_policy(theta0)
        return np.exp(moved[batch.contexts[:, None], batch.actions])

    def objective(self, step: int, theta0: Mapping[str, np.ndarray]) -> Gradient:
        """That step's loss: params -> (loss, gradient), with the old log-probabilities fixed at `theta0` now."""
        batch = self.rollouts(step)
        picked = (batch.contexts[:, None], batch.actions)
        old_logp = self.log_policy(theta0)[picked]
        ref_logp = self.log_policy(self.initial())[picked] if self.beta else None
        weights = np.exp(old_logp) * self.chances.shape[1] if self.on_policy else 1.0
        advantages = weights * batch.advantages

        # A port may ask anywhere: it gets inf and nan back, as from any framework, not a numpy warning.
        @np.errstate(over="ignore", invalid="ignore")
        def gradient(params: Mapping[str, np.ndarray]) -> tuple[float, Params]:
            log_policy = self.log_policy(params)
            logp = log_policy[picked]
            loss, dlogp = clipped_loss(logp, old_logp, advantages, self.clip, ref_logp, self.beta)
            picks = np.zeros_like(log_policy)
            np.add.at(picks, picked, dlogp)  # an action picked twice counts twice
            # d log pi(a) / d logits = onehot(a) - pi
            return loss, self._chain(picks - np.exp(log_policy) * picks.sum(axis=1, keepdims=True))

        return gradient


@dataclass(frozen=True, kw_only=True)
class Bandit(_SoftmaxPolicy):
    """One state; arm a is rewarded with 1 with probability means[a], else 0. Parameters: {"logits": (arms,)}."""

    means: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("the number of means", len(self.means), 2)
        if not all(0 <= mean <= 1 for mean in self.means):
            raise ValueError(f"means must lie in [0, 1], got {self.means}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"logits": (len(self.means),)}

    @property
    def chances(self) -> np.ndarray:
        return np.array([self.means], dtype=np.float64)

    def _logits(self, params: Params) -> np.ndarray:
        return params["logits"][None, :]

    def _chain(self, dlogits: np.ndarray) -> Params:
        return {"logits": dlogits[0]}


@dataclass(frozen=True, kw_only=True)
class ContextualBandit(_SoftmaxPolicy):
    """One right answer per context, reward 1 for it and 0 for all others; `reward` is then pass@1.

    A linear softmax policy on fixed random features: {"weight": (arms, features), "bias": (arms,)}. A hidden linear
    policy chose the right answers, so that some parameters solve every context.
    """

    contexts: int = 6
    arms: int = 4
    features: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("contexts", self.contexts, 1)
        _at_least("arms", self.arms, 2)
        _at_least("features", self.features, 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.arms, self.features), "bias": (self.arms,)}

    @cached_property
    def inputs(self) -> np.ndarray:
        """(contexts, features), about unit length each, read-only."""
        inputs = _stream(_TASK, self.seed).standard_normal((self.contexts, self.features)) / np.sqrt(self.features)
        inputs.setflags(write=False)
        return inputs

    @cached_property
    def answers(self) -> np.ndarray:
        """(contexts,): the arm that is right, read-only."""
        teacher = _stream(_TASK, self.seed, 1).standard_normal((self.features, self.arms))
        answers = (self.inputs @ teacher).argmax(axis=1)
        answers.setflags(write=False)
        return answers

    @property
    def chances(self) -> np.ndarray:
        return np.eye(self.arms)[self.answers]

    def _logits(self, params: Params) -> np.ndarray:
        return self.inputs @ params["weight"].T + params["bias"]

    def _chain(self, dlogits: np.ndarray) -> Params:
        return {"weight": dlogits.T @ self.inputs, "bias": dlogits.sum(axis=0)}


def _stream(purpose: int, seed: int, step: int = 0) -> np.random.Generator:
    _at_least("seed", seed, 0)
    _at_least("step", step, 0)
    return np.random.default_rng([purpose, seed, step])


def _at_least(name: str, value: float, bound: float) -> None:
    if not value >= bound:
        raise ValueError(f"{name} must be at least {bound}, got {value}")
