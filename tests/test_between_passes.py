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
