"""The bandits, the toy problems with a policy, against finite differences, autograd and closed forms.

Ports are judged on these problems: an error here fails a right port, or passes a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_gradients import assert_params_close, drawn, finite_differences, seeds, shifted

from gxpo_reference import grpo_loss as torch_loss
from gxpo_toy_tasks.tasks.bandits import Bandit, ContextualBandit, Gradient, Params, clipped_loss, group_advantages
from gxpo_toy_tasks.tasks.quadratics import Quadratic

AnyBandit = Bandit | ContextualBandit
bandits = pytest.mark.parametrize("task", [Bandit, ContextualBandit])


@drawn
@given(st.integers(1, 4), st.integers(2, 8), seeds)
def test_group_advantages_are_those_of_the_torch_loss(groups: int, responses: int, seed: int) -> None:
    """Otherwise the toy problems and the training runs normalise differently under one name."""
    rewards = np.random.default_rng(seed).integers(0, 3, (groups, responses)) * 0.1
    wanted = torch_loss.group_advantages(torch.from_numpy(rewards)).numpy()
    np.testing.assert_allclose(group_advantages(rewards), wanted, rtol=1e-12, atol=1e-12)


@drawn
@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_all_equal_rewards_give_exact_zeros(reward: float, responses: int) -> None:
    """Otherwise rounding noise, divided by 1e-4, stands where a zero gradient should."""
    assert not group_advantages(np.full((2, responses), reward)).any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1.0, 1.1, -1.1, -1.1),
        (1.0, 1.3, -1.2, 0.0),  # min(1.3, 1.2), clipped
        (1.0, 0.5, -0.5, -0.5),  # min(0.5, 0.8)
        (-1.0, 0.5, 0.8, 0.0),  # -min(-0.5, -0.8), clipped
        (-1.0, 1.3, 1.3, 1.3),  # -min(-1.3, -1.2)
    ],
)
def test_clip_branches_by_hand(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """Otherwise the bandits clip on the wrong side."""
    got = clipped_loss(np.log([[ratio]]), np.zeros((1, 1)), np.array([[advantage]]), clip=0.2)
    assert got[0] == pytest.approx(loss)
    assert got[1] == pytest.approx(slope)


def moved_objective(task: AnyBandit, step: int, seed: int, scale: float) -> tuple[Gradient, Params, Params]:
    """The loss of `step`, its theta0, and another point, where no ratio is near a clip edge."""
    theta0 = task.initial(seed)
    params = shifted(theta0, scale, seed)
    ratios = task.ratios(step, theta0, params)
    edges = np.minimum(np.abs(ratios - (1 - task.clip)), np.abs(ratios - (1 + task.clip)))
    assume(edges.min() > 1e-3)
    return task.objective(step, theta0), theta0, params


options = st.fixed_dictionaries({"beta": st.sampled_from([0.0, 0.2]), "on_policy": st.booleans()})
scales = st.sampled_from([0.0, 0.1, 1.0])


@bandits
@settings(drawn, max_examples=25)
@given(step=st.integers(0, 50), seed=seeds, scale=scales, options=options)
def test_bandit_gradient_matches_finite_differences(
    task: type[AnyBandit], step: int, seed: int, scale: float, options: dict[str, Any]
) -> None:
    """Otherwise a port follows a gradient that belongs to no loss."""
    gradient, _, params = moved_objective(task(seed=1, **options), step, seed, scale)
    assert_params_close(gradient(params)[1], finite_differences(lambda at: gradient(at)[0], params), 1e-8)


def autograd(task: AnyBandit, step: int, theta0: Params, at: Params) -> tuple[float, Params]:
    """The same loss, written independently: torch's softmax, autograd, and `grpo_loss` on one-token responses."""
    batch = task.rollouts(step)
    responses = batch.actions.size

    def logps(params: dict[str, torch.Tensor]) -> torch.Tensor:
        if isinstance(task, Bandit):
            logits = params["logits"].expand(responses, -1)
        else:
            contexts = torch.from_numpy(np.repeat(task.inputs[batch.contexts], task.responses, axis=0))
            logits = torch.nn.functional.linear(contexts, params["weight"], params["bias"])
        return torch.log_softmax(logits, -1).gather(1, torch.from_numpy(batch.actions.reshape(-1, 1)))

    def tensors(params: Params) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}

    theta = tensors(at)
    old = logps(tensors(theta0))
    advantages = torch_loss.group_advantages(torch.from_numpy(batch.rewards)).flatten()
    if task.on_policy:
        advantages = advantages * old[:, 0].exp() * (5 if isinstance(task, Bandit) else 4)
    reference = logps(tensors(task.initial()))
    loss, _ = torch_loss.grpo_loss(logps(theta), old, advantages, clip=task.clip, ref_logps=reference, beta=task.beta)
    loss.backward()
    return loss.item(), {name: value.grad.numpy() for name, value in theta.items()}


@bandits
@settings(drawn, max_examples=40)
@given(step=st.integers(0, 50), seed=seeds, scale=scales, options=options)
def test_bandit_loss_and_gradient_match_torch(
    task: type[AnyBandit], step: int, seed: int, scale: float, options: dict[str, Any]
) -> None:
    """Otherwise the suite's GRPO and the training loss part ways, at the clip above all."""
    bandit = task(seed=1, **options)
    gradient, theta0, params = moved_objective(bandit, step, seed, scale)
    loss, grads = gradient(params)
    wanted, wanted_grads = autograd(bandit, step, theta0, params)
    assert loss == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert_params_close(grads, wanted_grads, 1e-12)


@bandits
def test_a_large_move_is_clipped(task: type[AnyBandit]) -> None:
    """Otherwise no toy run ever reaches the clip, and the comparison with torch above never sees it."""
    bandit = task()
    theta0 = bandit.initial()
    ratios = bandit.ratios(0, theta0, shifted(theta0, 1.0, seed=0))
    advantages = bandit.rollouts(0).advantages
    assert ((ratios > 1.2) & (advantages > 0)).any()
    assert ((ratios < 0.8) & (advantages < 0)).any()


@bandits
def test_old_log_probabilities_stay_at_theta0(task: type[AnyBandit]) -> None:
    """Otherwise a port that updates its parameters in place moves theta0 under the loss."""
    bandit = task()
    theta0 = bandit.initial()
    params = shifted(theta0, 0.3, seed=0)
    gradient = bandit.objective(0, theta0)
    before = gradient(params)
    for value in theta0.values():
        value += 10.0
    after = gradient(params)
    assert before[0] == after[0]
    assert_params_close(after[1], before[1], 0.0)
    assert before[0] != bandit.objective(0, params)(params)[0]


@bandits
def test_rollouts_are_fixed_by_seed_and_step(task: type[AnyBandit]) -> None:
    """Otherwise oracle and port train on different data, or every step on the same."""
    one, same = task(seed=5).rollouts(7), task(seed=5).rollouts(7)
    for field in ("contexts", "actions", "rewards", "advantages"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
    assert one.actions.shape == one.rewards.shape == one.advantages.shape == (8, 8)
    assert one.contexts.shape == (8,)
    for other in (task(seed=5).rollouts(8), task(seed=6).rollouts(7)):
        assert not np.array_equal(one.actions, other.actions)


@bandits
def test_initial_parameters_are_fixed_by_seed_and_fresh(task: type[AnyBandit]) -> None:
    """Otherwise runs start apart, or one run's in-place updates move the next one's start and the reference policy."""
    bandit = task(seed=2)
    start = bandit.initial()
    assert_params_close(bandit.initial(2), start, 0.0)
    start["bias" if "bias" in start else "logits"] += 1.0
    assert_params_close(bandit.initial(2), bandit.initial(), 0.0)
    assert any(not np.array_equal(bandit.initial(3)[name], bandit.initial()[name]) for name in start)
    spread = np.std(np.concatenate([value.ravel() for at in range(50) for value in bandit.initial(at).values()]))
    assert spread == pytest.approx(0.1, rel=0.2)
    assert sum(value.size for value in start.values()) <= 64  # the suite's limit


def test_rewards_are_what_the_task_says() -> None:
    """Otherwise "right answer" and "mean reward" mean something else than documented."""
    contextual = ContextualBandit(groups=50)
    batch = contextual.rollouts(0)
    assert np.array_equal(batch.rewards, batch.actions == contextual.answers[batch.contexts][:, None])
    bandit = Bandit(groups=400, responses=100)
    batch = bandit.rollouts(0)
    for arm, mean in enumerate(bandit.means):
        rewards = batch.rewards[batch.actions == arm]
        assert len(rewards) == pytest.approx(8000, abs=400)  # uniform; 5 standard deviations of the binomial
        assert rewards.mean() == pytest.approx(mean, abs=0.03)


def test_expected_reward_is_exact() -> None:
    """Otherwise "ends at the same reward" compares estimates."""
    bandit = Bandit(means=(0.2, 0.8))
    # probabilities 1/4 and 3/4: 0.05 + 0.6
    assert bandit.reward({"logits": np.log([1.0, 3.0])}) == pytest.approx(0.65)
    contextual = ContextualBandit()
    uniform = {name: np.zeros(shape) for name, shape in contextual.shapes.items()}
    assert contextual.reward(uniform) == pytest.approx(1 / 4)


def descend(bandit: AnyBandit, lr: float, steps: int) -> list[float]:
    """Expected reward before, and after each plain step on that step's rollouts."""
    theta = bandit.initial()
    rewards = [bandit.reward(theta)]
    for step in range(steps):
        grads = bandit.objective(step, theta)(theta)[1]
        theta = {name: theta[name] - lr * grads[name] for name in theta}
        rewards.append(bandit.reward(theta))
    return rewards


@bandits
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"beta": 0.001}, {"on_policy": True}])
def test_expected_reward_rises_under_plain_steps(task: type[AnyBandit], seed: int, options: dict[str, Any]) -> None:
    """Otherwise a sign is wrong somewhere, or fixed rollouts teach nothing."""
    rewards = descend(task(seed=seed, **options), lr=1.0, steps=20)
    assert rewards[20] > rewards[10] > rewards[0] + 0.1
    assert rewards[20] > rewards[0] + 0.25


def test_on_policy_weights_solve_the_contextual_bandit() -> None:
    """Otherwise no learner can reach pass@1 = 1 here, and comparing learners compares how they miss it."""
    bandit = ContextualBandit(groups=32, on_policy=True)
    assert descend(bandit, lr=5.0, steps=200)[-1] > 0.98
    assert len(set(bandit.answers.tolist())) > 1  # or a bias alone would do


@pytest.mark.parametrize(("on_policy", "follows"), [(True, True), (False, False)])
def test_on_policy_weights_give_the_policy_gradient(on_policy: bool, follows: bool) -> None:
    """Otherwise the weights are upside down, or the warning about unweighted uniform rollouts is wrong."""
    bandit = Bandit(groups=500, responses=50, on_policy=on_policy)
    theta = {"logits": np.array([2.0, 1.0, 0.0, -1.0, -2.0])}
    policy = np.exp(bandit.log_policy(theta)[0])
    exact = policy * (np.array(bandit.means) - bandit.reward(theta))  # d reward / d logits
    got = -bandit.objective(0, theta)(theta)[1]["logits"]
    cosine = got @ exact / (np.linalg.norm(got) * np.linalg.norm(exact))
    assert (cosine > 0.98) == follows


@bandits
def test_gradient_at_theta0_is_the_same_wherever_theta0_is(task: type[AnyBandit]) -> None:
    """Otherwise the module's warning about its uniform rollouts is wrong; with a KL term it must not hold."""
    for beta, differs in ((0.0, False), (0.2, True)):
        bandit = task(beta=beta)
        here, there = bandit.initial(), shifted(bandit.initial(), 1.0, seed=0)
        one, other = (bandit.objective(0, at)(at)[1] for at in (here, there))
        assert any(np.abs(one[name] - other[name]).max() > 1e-12 for name in one) == differs


@bandits
def test_a_wild_port_gets_numbers_not_warnings(task: type[AnyBandit]) -> None:
    """Otherwise a broken port is reported as a broken harness: numpy's warnings are errors here."""
    bandit = task(beta=0.1)
    gradient = bandit.objective(0, bandit.initial())
    for value in (np.nan, np.inf, 1e300):
        wild = bandit.initial()
        for array in wild.values():
            array.flat[0] = value
        bandit.reward(wild)
        loss, grads = gradient(wild)
        assert isinstance(loss, float)
        assert np.isfinite(loss) or not all(np.isfinite(grad).all() for grad in grads.values())
    quadratic = Quadratic.rotated()
    assert quadratic.loss({"x": np.full(8, 1e300)}) == np.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandit(groups=0), "groups must be at least 1, got 0"),
        (lambda: Bandit(responses=1), "responses must be at least 2, got 1"),
        (lambda: Bandit(clip=0.0), "clip must be greater than 0, got 0.0"),
        (lambda: Bandit(beta=-1.0), "beta must be at least 0, got -1.0"),
        (lambda: Bandit(beta=np.nan), "beta must be at least 0, got nan"),
        (lambda: Bandit(seed=-1), "seed must be at least 0, got -1"),
        (lambda: Bandit(means=(0.5,)), "number of means must be at least 2, got 1"),
        (lambda: Bandit(means=(0.5, 1.5)), r"means must lie in \[0, 1\], got \(0.5, 1.5\)"),
        (lambda: ContextualBandit(contexts=0), "contexts must be at least 1, got 0"),
        (lambda: ContextualBandit(arms=1), "arms must be at least 2, got 1"),
        (lambda: ContextualBandit(features=0), "features must be at least 1, got 0"),
        (lambda: Bandit().rollouts(-1), "step must be at least 0, got -1"),
        (lambda: Bandit().initial(-1), "seed must be at least 0, got -1"),
        (lambda: Bandit().reward({"logits": np.zeros(3)}), r"params must have .*\(5,\).*got .*\(3,\)"),
        (lambda: ContextualBandit().objective(0, {"weight": np.zeros((4, 5))}), "params must have .*bias"),
        (lambda: group_advantages(np.zeros(4)), r"\(groups, responses\).*got \(4,\)"),
        (lambda: group_advantages(np.zeros((4, 1))), r"at least 2, got \(4, 1\)"),
    ],
)
def test_bandits_name_a_bad_argument(make: Callable[[], Any], message: str) -> None:
    """Otherwise a mistake in a case broadcasts into another problem, or gives nan."""
    with pytest.raises(ValueError, match=message):
        make()
