"""SFPO and GRPO against loops written out with torch's optimizers: a wrong baseline makes every comparison wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gxpo import GXPO, Gate
from gxpo_reference.baselines import GRPO, SFPO


def problem() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)


def loss_of(theta: Tensor) -> Tensor:
    return (theta**4).sum() / 4 + theta.prod()


def plain_step(theta: Tensor, base: torch.optim.Optimizer) -> None:
    base.zero_grad()
    loss_of(theta).backward()
    torch.nn.utils.clip_grad_norm_([theta], 2.0)
    base.step()


@pytest.mark.parametrize("horizon", [2, 3, 5])
def test_sfpo_is_k_steps_back_part_of_the_way_and_one_more(horizon: int) -> None:
    ours, theirs = problem(), problem()
    opt = SFPO(torch.optim.AdamW([ours], lr=0.1), horizon=horizon, alpha=0.8, max_grad_norm=2.0, gate=None)
    base = torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(4):
        for _ in opt.passes():
            loss_of(ours).backward()
        theta0 = theirs.detach().clone()
        for _ in range(horizon):
            plain_step(theirs, base)
        theirs.detach().lerp_(theta0, 0.2)
        plain_step(theirs, base)
    assert opt.report.passes == horizon + 1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_grpo_is_the_plain_step() -> None:
    ours, theirs = problem(), problem()
    opt, base = GRPO(torch.optim.AdamW([ours], lr=0.1), max_grad_norm=2.0), torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(4):
        opt.step(lambda: (loss := loss_of(ours), loss.backward())[0])
        plain_step(theirs, base)
    assert opt.report.passes == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gxpo_with_two_steps_is_sfpo_with_two_steps() -> None:
    """They are one rule there; if they differ, one of both is wrong."""
    one, other = problem(), problem()
    gxpo = GXPO(torch.optim.AdamW([one], lr=0.1), horizon=2, alpha=0.8, gate=None)
    sfpo = SFPO(torch.optim.AdamW([other], lr=0.1), horizon=2, alpha=0.8, gate=None)
    for _ in range(5):
        for opt, theta in ((gxpo, one), (sfpo, other)):
            for _ in opt.passes():
                loss_of(theta).backward()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sfpos_gate_watches_the_entropy_both_ways() -> None:
    """What is feared is the entropy's collapse: a value far below the usual closes the gate."""
    theta = problem()
    opt = SFPO(
        torch.optim.SGD([theta], lr=0.01), gate=Gate("supplied", window=3, threshold=1.0, patience=1, two_sided=True)
    )
    for entropy in (1.0, 1.1, 0.9, 0.2, 1.0):
        opt.observe(statistic=entropy)
        opt.step(lambda: (loss := loss_of(theta), loss.backward())[0])
    assert opt.report.fallback_step == 3
    assert opt.report.passes == 1
    default = SFPO(torch.optim.SGD([theta], lr=0.01))
    with pytest.raises(RuntimeError, match=r"call observe\(statistic=...\)"):
        default.step(lambda: (loss := loss_of(theta), loss.backward())[0])


def test_sfpo_has_its_authors_defaults() -> None:
    """K = 3, alpha = 0.8 and an entropy gate of window 30 that closes at once and for good."""
    theta = torch.ones(2, requires_grad=True)
    opt = SFPO(torch.optim.SGD([theta], lr=0.1), rollback=False)
    gate = opt.gate
    assert (opt.horizon, opt.alpha, opt.rollback) == (3, 0.8, False)
    assert (gate.statistic, gate.baseline, gate.window) == ("supplied", "window", 30)
    assert (gate.threshold, gate.patience, gate.two_sided, gate.cooldown) == (1.0, 1, True, None)
