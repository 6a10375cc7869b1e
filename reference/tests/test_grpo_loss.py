"""The GRPO loss against numbers worked out by hand, REINFORCE, and the mistakes people make with it.

If these fail, every training result of this project was obtained with a loss that is not the one it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gxpo_reference.grpo_loss import group_advantages, grpo_loss

drawn = settings(max_examples=60, deadline=None, database=None)
LOG2 = math.log(2.0)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(values: Any) -> Tensor:
    return tensor(values).requires_grad_()


def close(got: Tensor, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.detach(), tensor(wanted), rtol=tolerance, atol=tolerance)


# group_advantages


def test_advantages_by_hand() -> None:
    """Otherwise every gradient is scaled by a factor that depends on the group size (population against sample std)."""
    # rewards 1 0 0 0: mean 1/4, squared deviations 9/16 + 3/16 = 12/16, sample variance (12/16) / 3 = 1/4, std 1/2.
    # rewards 0 1 1 0: mean 1/2, squared deviations 4/4 = 1, sample variance 1/3, std 0.57735...
    std = math.sqrt(1 / 3)
    wanted = [[0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]]
    wanted += [[-0.5 / (std + 1e-4), 0.5 / (std + 1e-4), 0.5 / (std + 1e-4), -0.5 / (std + 1e-4)]]
    close(group_advantages(tensor([[1, 0, 0, 0], [0, 1, 1, 0]])), wanted)


def test_unscaled_advantages_by_hand() -> None:
    """Otherwise scale=False is not Dr. GRPO's: groups with little spread would still be blown up."""
    close(
        group_advantages(tensor([[1, 0, 0, 0], [3, 1, 1, 3]]), scale=False),
        [[0.75, -0.25, -0.25, -0.25], [1, -1, -1, 1]],
    )


@drawn
@given(st.floats(-1e6, 1e6), st.integers(2, 9), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_all_equal_rewards_give_exact_zeros(reward: float, responses: int, scale: bool, dtype: torch.dtype) -> None:
    """Otherwise rounding noise, divided by 1e-4, trains on groups that hold no signal (three rewards of 0.1 do)."""
    rewards = torch.full((2, responses), reward, dtype=dtype)
    assert torch.count_nonzero(group_advantages(rewards, scale)) == 0


@drawn
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.floats(-5, 5))
def test_advantages_are_centred_and_ignore_a_constant(rewards: list[float], shift: float) -> None:
    """Otherwise a reward model's offset would push up (or down) every response alike."""
    group = tensor([rewards])
    advantages = group_advantages(group, scale=False)
    assert abs(advantages.sum()) < 1e-12
    close(group_advantages(group + shift, scale=False), advantages.tolist())


def test_advantages_of_whole_number_and_boolean_rewards() -> None:
    """Otherwise a verifier that answers True or 1 cannot be used without a cast."""
    wanted = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(group_advantages(torch.tensor([[1, 0, 0]])), wanted)
    assert torch.equal(group_advantages(torch.tensor([[True, False, False]])), wanted)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (2, 0), (1, 2, 3)])
def test_advantages_refuse_shapes_that_have_no_groups(shape: tuple[int, ...]) -> None:
    """Otherwise a flat batch of rewards is normalised across prompts, or a group of one gives nan."""
    with pytest.raises(ValueError, match=r"\(groups, responses\).*got \(" + str(shape[0])):
        group_advantages(torch.zeros(shape))


# grpo_loss: values and gradients by hand


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "clipped"),
    [
        # d loss / d logp = -A ratio where the plain branch is the smaller one, 0 where the clipped one is.
        (2.0, 1.0, -2.0, -2.0, 0),  # min(2, 2) = 2
        (2.0, 1.1, -2.2, -2.2, 0),  # inside: min(2.2, 2.2)
        (2.0, 1.5, -2.4, 0.0, 1),  # above, already pushed enough: min(3, 1.2 * 2 = 2.4), no gradient
        (2.0, 0.5, -1.0, -1.0, 0),  # below, fell although good: min(1, 0.8 * 2 = 1.6), gradient stays
        (-2.0, 1.0, 2.0, 2.0, 0),  # -min(-2, -2)
        (-2.0, 0.9, 1.8, 1.8, 0),  # inside
        (-2.0, 0.5, 1.6, 0.0, 1),  # below, already pushed enough: -min(-1, 0.8 * -2 = -1.6), no gradient
        (-2.0, 1.5, 3.0, 3.0, 0),  # above, grew although bad: -min(-3, 1.2 * -2 = -2.4), gradient stays
        (0.0, 1.5, 0.0, 0.0, 0),
    ],
)
def test_clip_branches(advantage: float, ratio: float, loss: float, slope: float, clipped: int) -> None:
    """Otherwise the loss clips on the wrong side: it pushes on where it should stop, or cannot undo a mistake."""
    logps = leaf([[math.log(ratio) - 1.0]])
    got, metrics = grpo_loss(logps, tensor([[-1.0]]), tensor([advantage]))
    got.backward()
    close(got, loss)
    close(logps.grad, [[slope]])
    close(metrics["clip_fraction"], clipped)
    close(metrics["ratio_mean"], ratio)
    assert set(metrics) == {"clip_fraction", "ratio_mean"}
    assert not any(value.requires_grad for value in metrics.values())


def test_clip_width_is_the_argument() -> None:
    """Otherwise a run that sets clip trains with 0.2."""
    loss, _ = grpo_loss(tensor([[math.log(1.5)]]), tensor([[0.0]]), tensor([1.0]), clip=0.4)
    close(loss, -1.4)  # min(1.5, 1.4)


def test_k3_values_and_gradient() -> None:
    """Otherwise the KL penalty is another estimator (k1 can be negative), or pulls away from the reference."""
    # d = ref - logp = log 2, 0, -log 2.  k3 = exp(d) - d - 1: 1 - log 2, 0, log 2 - 1/2.
    # d k3 / d logp = 1 - exp(d): -1, 0, 1/2.  Mean over 3 tokens, times beta = 0.3: 0.1 of each.
    logps = leaf([[-1.0, -1.0, -1.0]])
    ref = tensor([[-1.0 + LOG2, -1.0, -1.0 - LOG2]])
    loss, metrics = grpo_loss(logps, logps, tensor([0.0]), ref_logps=ref, beta=0.3)
    loss.backward()
    close(loss, 0.1 * (1 - LOG2) + 0.1 * (LOG2 - 0.5))
    close(metrics["kl"], (1 - LOG2 + LOG2 - 0.5) / 3)
    close(logps.grad, [[-0.1, 0.0, 0.05]])


def test_k3_survives_float32_near_the_reference() -> None:
    """Otherwise the KL of an early policy is rounding noise: at d = 1e-4, exp(d) - d - 1 in float32 is 0 or 1e-7."""
    logps = torch.zeros(1, 1, dtype=torch.float32)
    _, metrics = grpo_loss(logps, logps, torch.zeros(1), ref_logps=torch.full((1, 1), 1e-4))
    assert metrics["kl"].item() == pytest.approx(0.5e-8, rel=1e-2)  # d^2 / 2


def test_kl_without_beta_is_only_a_metric() -> None:
    """Otherwise watching the KL changes the run."""
    logps = leaf([[-1.0, -2.0]])
    old, advantages = tensor([[-1.1, -2.0]]), tensor([1.0])
    watched, metrics = grpo_loss(logps, old, advantages, ref_logps=tensor([[-9.0, 0.0]]))
    assert torch.equal(watched, grpo_loss(logps, old, advantages)[0])
    assert metrics["kl"] > 0


def test_mean_over_tokens_then_over_responses() -> None:
    """Otherwise long responses weigh more (DAPO's token mean): another loss, with another learning rate."""
    # Response 0, A = 1, three tokens at ratio 1: -1. Response 1, A = -1, one token at ratio 1: +1. Mean 0.
    # Over all four tokens it would be (-3 + 1) / 4 = -1/2.
    logps = leaf([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]])
    mask = tensor([[1, 1, 1], [1, 0, 0]])
    loss, _ = grpo_loss(logps, logps.detach(), tensor([1.0, -1.0]), mask)
    loss.backward()
    close(loss, 0.0)
    close(logps.grad, [[-1 / 6, -1 / 6, -1 / 6], [1 / 2, 0, 0]])  # -A / tokens / responses


def test_metrics_are_averaged_like_the_loss() -> None:
    """Otherwise a logged clip fraction or KL cannot be compared with the loss it belongs to."""
    # Response 0: ratios 2 (clipped), 1 -> clip 1/2, ratio 3/2; d = log 2, 0 -> kl (1 - log 2) / 2.
    # Response 1: ratio 1 and padding -> clip 0, ratio 1; kl 0.
    logps = tensor([[LOG2, 0.0], [0.0, 5.0]])
    ref = tensor([[2 * LOG2, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    _, metrics = grpo_loss(logps, torch.zeros_like(logps), tensor([1.0, 1.0]), mask, ref_logps=ref)
    close(metrics["clip_fraction"], 1 / 4)
    close(metrics["ratio_mean"], 5 / 4)
    close(metrics["kl"], (1 - LOG2) / 4)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_padding_does_not_matter(garbage: float) -> None:
    """Otherwise one -inf in the padding turns the whole gradient into nan, and GXPO skips the step."""
    logps = leaf([[-1.0, garbage], [-1.0, -2.0]])
    old, ref = tensor([[-1.1, garbage], [-1.0, -2.2]]), tensor([[-0.9, -garbage], [-1.0, -2.1]])
    mask = torch.tensor([[True, False], [True, True]])
    loss, metrics = grpo_loss(logps, old, tensor([1.0, -1.0]), mask, ref_logps=ref, beta=0.1)
    loss.backward()
    clean = leaf([[-1.0, 0.0], [-1.0, -2.0]])
    wanted, _ = grpo_loss(
        clean, old.masked_fill(~mask, 0), tensor([1.0, -1.0]), mask, ref_logps=ref.masked_fill(~mask, 0), beta=0.1
    )
    wanted.backward()
    assert torch.equal(loss, wanted)
    assert torch.equal(logps.grad, clean.grad)
    assert logps.grad[0, 1] == 0
    assert all(torch.isfinite(value) for value in metrics.values())


def test_a_response_without_tokens_adds_nothing() -> None:
    """Otherwise an empty response is a division by zero."""
    logps = leaf([[-1.0, -1.0], [-1.0, -1.0]])
    loss, _ = grpo_loss(logps, logps.detach(), tensor([1.0, 1.0]), torch.tensor([[1, 1], [0, 0]]))
    loss.backward()
    close(loss, -0.5)  # (-1 + 0) / 2
    close(logps.grad, [[-0.25, -0.25], [0, 0]])


# grpo_loss: what it must agree with and differ from, on a small policy


def policy_logps(weights: Tensor, actions: Tensor) -> Tensor:
    """(batch, tokens) from a table of logits (tokens, vocabulary)."""
    return torch.log_softmax(weights, dim=-1).expand(len(actions), -1, -1).gather(2, actions.unsqueeze(2)).squeeze(2)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """theta0 (4, 5), actions (6, 4), advantages (6,) of two groups of three, mask (6, 4)."""
    rng = torch.Generator().manual_seed(0)
    theta0 = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    actions = torch.randint(5, (6, 4), generator=rng)
    advantages = group_advantages(tensor([[1, 0, 0], [1, 1, 0]])).flatten()
    mask = tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    return theta0, actions, advantages, mask


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    theta = at.clone().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


def test_gradient_at_theta0_is_reinforce_with_group_baseline(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Otherwise GXPO's first pass is not the policy gradient, and a single-pass step is not GRPO."""
    theta0, actions, advantages, mask = batch
    old = policy_logps(theta0, actions)

    def reinforce(theta: Tensor) -> Tensor:
        per_response = (policy_logps(theta, actions) * mask).sum(1) / mask.sum(1)
        return -(advantages * per_response).mean()

    got = gradient(lambda theta: grpo_loss(policy_logps(theta, actions), old, advantages, mask)[0], theta0)
    close(got, gradient(reinforce, theta0).tolist())
    assert got.abs().max() > 1e-2


def test_fixed_old_logps_differ_from_recomputed_ones_off_theta0(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Otherwise a loss that recomputes its old log-probabilities (ratio 1 everywhere) could pass for this one."""
    theta0, actions, advantages, mask = batch
    old = policy_logps(theta0, actions)

    def fixed(theta: Tensor) -> Tensor:
        return grpo_loss(policy_logps(theta, actions), old, advantages, mask)[0]

    def recomputed(theta: Tensor) -> Tensor:
        logps = policy_logps(theta, actions)
        return grpo_loss(logps, logps.detach(), advantages, mask)[0]

    close(gradient(fixed, theta0), gradient(recomputed, theta0).tolist())
    moved = theta0 - 2.0 * gradient(fixed, theta0)
    assert abs(fixed(moved) - recomputed(moved)) > 1e-2
    assert (gradient(fixed, moved) - gradient(recomputed, moved)).abs().max() > 1e-2


def test_no_gradient_reaches_old_logps_ref_logps_or_advantages() -> None:
    """Otherwise old log-probabilities still on the graph cancel the gradient: ratio = 1 with slope 0."""
    logps = leaf([[-1.0, -2.0]])
    advantages, ref = leaf([1.0]), leaf([[-1.5, -1.5]])
    loss, _ = grpo_loss(logps, logps, advantages, ref_logps=ref, beta=0.5)
    loss.backward()
    assert advantages.grad is None
    assert ref.grad is None
    # -A / 2 + beta (1 - exp(d)) / 2 with d = -0.5 and 0.5.
    close(logps.grad, [[-0.5 + 0.25 * (1 - math.exp(-0.5)), -0.5 + 0.25 * (1 - math.exp(0.5))]])


def test_all_equal_rewards_give_zero_gradient(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Otherwise a batch without signal moves the policy, and reaches the gate as an observation."""
    theta0, actions, _, mask = batch
    old = policy_logps(theta0, actions)
    advantages = group_advantages(torch.full((2, 3), 0.1, dtype=torch.float64)).flatten()
    got = gradient(lambda theta: grpo_loss(policy_logps(theta, actions), old, advantages, mask)[0], theta0 + 0.3)
    assert torch.count_nonzero(got) == 0


@drawn
@given(seed=st.integers(0, 10_000), beta=st.sampled_from([0.0, 0.1]))
def test_gradient_is_that_of_the_loss(seed: int, beta: float) -> None:
    """Otherwise a detach sits in the wrong place, and the gradient belongs to another loss."""
    rng = torch.Generator().manual_seed(seed)
    old, moved, ref = (torch.randn(3, 4, generator=rng, dtype=torch.float64) * 0.3 - 1.0 for _ in range(3))
    advantages = torch.randn(3, generator=rng, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=rng) < 0.7
    ratio = (moved - old).exp()
    # The loss has a kink at each clip edge; move what lies within the difference's reach out of it.
    near = ((ratio - 0.8).abs() < 1e-3) | ((ratio - 1.2).abs() < 1e-3)
    moved = torch.where(near, old, moved)

    def loss(logps: Tensor) -> Tensor:
        return grpo_loss(logps, old, advantages, mask, ref_logps=ref, beta=beta)[0]

    got = gradient(loss, moved)
    shift = 1e-5 * torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    wanted = torch.stack([loss(moved + s) - loss(moved - s) for s in shift]).reshape(3, 4) / 2e-5
    close(got, wanted.tolist(), tolerance=1e-8)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": torch.zeros(2)}, r"logps must have shape \(batch, tokens\).*got \(2,\)"),
        ({"logps": torch.zeros(0, 3)}, r"logps must have .*batch at least 1, got \(0, 3\)"),
        ({"old_logps": torch.zeros(2, 1)}, r"old_logps must have shape \(2, 3\).*got \(2, 1\)"),
        ({"advantages": torch.zeros(2, 1)}, r"advantages must have shape \(2,\).*got \(2, 1\)"),
        ({"advantages": torch.zeros(3)}, r"advantages must have shape \(2,\).*got \(3,\)"),
        ({"mask": torch.ones(2)}, r"mask must have shape \(2, 3\).*got \(2,\)"),
        ({"ref_logps": torch.zeros(1, 3)}, r"ref_logps must have shape \(2, 3\).*got \(1, 3\)"),
        ({"clip": 0.0}, r"clip must be greater than 0, got 0\.0"),
        ({"clip": math.nan}, r"clip must be greater than 0, got nan"),
        ({"beta": -0.1}, r"beta must be at least 0, got -0\.1"),
        ({"beta": 0.1}, r"beta = 0\.1 needs ref_logps"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """Otherwise (batch, 1) tensors broadcast into a wrong loss without a word."""
    good: dict[str, Any] = {"logps": torch.zeros(2, 3), "old_logps": torch.zeros(2, 3), "advantages": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(good | change))
