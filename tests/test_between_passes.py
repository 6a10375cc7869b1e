"""If these fail, what changes between the passes of a step goes unseen: a rate, the parameters, the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from failing import Case, same
from torch import Tensor

from gxpo import GXPO


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("what", ["scheduler", "add_param_group", "a tensor's value"])
def test_rates_and_parameters_that_change_inside_a_step(what: str, at: int) -> None:
    """A scheduler in the closure steps three times a batch, and the fast steps are of unlike length: r means nothing.
    In pass 1 it can be seen only once it does it again."""
    case = Case(lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1) if what == "a tensor's value" else 0.1, momentum=0.9))
    base = case.opt.base
    run = case.closure()
    before = case.snapshot()

    def closure() -> Tensor:
        loss = run()
        if case.calls < at:
            return loss
        if what == "scheduler":
            base.param_groups[0]["lr"] *= 0.9
        elif what == "a tensor's value":
            base.param_groups[0]["lr"].mul_(0.9)
        else:
            base.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
        return loss

    with pytest.raises(RuntimeError, match="a learning rate or the set of parameters changed between the passes"):
        case.opt.step(closure)
    assert same(case.snapshot()["params"], before["params"])
    assert not base.state  # as before the first step


def test_an_optimizer_may_adapt_its_own_rate() -> None:
    class Adapts(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.param_groups[0]["lr"] *= 0.9

    for policy in ("keep", "restore"):
        case = Case(lambda p: Adapts(p, lr=0.1), optimizer_state=policy)
        case.opt.step(case.closure())
        assert case.opt.report.active
        assert case.opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (3 if policy == "keep" else 1))


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


@pytest.mark.parametrize("interface", ["closure", "lookahead"])
def test_gradients_clipped_by_the_caller_are_told_once(interface: str) -> None:
    """At a norm pinned to 1.0 the gate can never see anything, and the run looks healthy until it is not."""
    torch.manual_seed(0)
    weights = torch.randn(50, requires_grad=True)
    opt = GXPO(torch.optim.SGD([weights], lr=1e-3))

    def closure() -> Tensor:
        loss = (weights**4).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        return loss

    def steps() -> None:
        for _ in range(20):
            if interface == "closure":
                opt.step(closure)
                continue
            opt.zero_grad()
            closure()
            while opt.lookahead():
                closure()
            opt.step()

    with pytest.warns(UserWarning, match="the norm of the gradient stays at 1: is it clipped in the closure") as caught:
        steps()
    assert len(caught) == 1


def test_constant_and_settling_gradients_are_not_taken_for_clipped_ones() -> None:
    """A warning that comes for nothing is one that nobody reads. Warnings are errors in these tests."""
    flat = torch.ones(4, requires_grad=True)
    steady = GXPO(torch.optim.SGD([flat], lr=0.1))
    still = torch.tensor([1.0, 1.0], requires_grad=True)
    stuck = GXPO(torch.optim.SGD([still], lr=0.0))
    for _ in range(10):
        steady.step(lambda: backward((flat * torch.tensor([0.5, 0.5, 0.5, 0.5])).sum()))
        stuck.step(lambda: backward((still * still).sum()))
    assert steady.report.grad_norms == (1.0, 1.0, 1.0)


# ----------------------------------------------------------------------------------------------------- check_same_batch


@pytest.mark.parametrize("interface", ["closure", "passes", "lookahead"])
def test_a_batch_drawn_anew_in_each_pass_is_found_by_check_same_batch(interface: str) -> None:
    """The most natural mistake: next(loader) inside the loop. It trains, and the extrapolation follows the noise."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)

    def run(batches: Any) -> GXPO:
        opt = GXPO(torch.optim.SGD(layer.parameters(), lr=0.1), check_same_batch=True)

        def loss() -> Tensor:
            return backward(layer(next(batches)).square().sum())

        if interface == "closure":
            opt.step(loss)
        elif interface == "passes":
            for _ in opt.passes():
                loss()
        else:
            loss()
            while opt.lookahead():
                loss()
            opt.step()
        return opt

    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(RuntimeError, match=r"two gradients at theta0 differ by \d.*, their norm is \d"):
        run(iter(torch.randn(9, 5, 3)))
    assert all(torch.equal(p.detach(), q) for p, q in zip(layer.parameters(), before, strict=True))
    layer.zero_grad()
    same = run(iter([torch.ones(5, 3)] * 9))
    assert (same.report.outcome, same.report.passes) == ("active", 4)


@pytest.mark.parametrize("scale", [1.05, 1.001])
def test_check_same_batch_asks_for_one_percent(scale: float) -> None:
    """Kernels that add in another order differ by rounding; another batch by more than a hundredth."""
    theta = torch.ones(3, requires_grad=True)
    opt = GXPO(torch.optim.SGD([theta], lr=0.1), check_same_batch=True)
    scales = iter((1.0, scale, 1.0, 1.0))

    def run() -> None:
        opt.step(lambda: backward(next(scales) * theta.square().sum()))

    if scale > 1.01:
        with pytest.raises(RuntimeError, match="check_same_batch"):
            run()
    else:
        run()
        assert opt.report.outcome == "active"


def test_check_same_batch_sees_a_parameter_that_only_the_second_batch_reaches() -> None:
    """An expert that only some batches are routed to."""
    theta, expert = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = GXPO(torch.optim.SGD([theta, expert], lr=0.1), check_same_batch=True)
    routed = iter((False, True, True, True))
    with pytest.raises(RuntimeError, match="check_same_batch"):
        opt.step(lambda: backward(theta.square().sum() + (expert.square().sum() if next(routed) else 0.0)))


def test_check_same_batch_changes_no_number_and_sees_dropout_that_is_not_replayed() -> None:
    weights, results = torch.arange(1.0, 9.0), []
    for settings in ({}, {"check_same_batch": True}):
        w = weights.clone().requires_grad_()
        torch.manual_seed(0)
        opt = GXPO(torch.optim.AdamW([w], lr=0.1), **settings)
        for _ in range(3):
            opt.step(lambda w=w: backward(torch.nn.functional.dropout(w * w, 0.5).sum()))
        results.append(w.detach())
    assert torch.equal(*results)
    careless = GXPO(torch.optim.AdamW([w], lr=0.1), check_same_batch=True, replay_rng=False)
    with pytest.raises(RuntimeError, match="random numbers"):
        careless.step(lambda: backward(torch.nn.functional.dropout(w * w, 0.5).sum()))
