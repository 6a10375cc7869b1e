"""If these fail, what people write into a closure by habit, or by mistake, takes another step than they think."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_by_hand import batches, mlp, same, snapshot, step, with_biases
from torch import Tensor

import gxpo
from gxpo import GXPO, Gate


def refused(opt: GXPO, params: list[Tensor], closure: Callable[[], Any], message: str) -> None:
    """The error, nothing lost, and a good step afterwards."""
    before = snapshot(opt.base, params), opt.gate_state
    with pytest.raises(RuntimeError, match=message):
        opt.step(closure)
    assert (snapshot(opt.base, params), opt.gate_state) == before
    step(opt, params, batches(1)[0])
    assert opt.report.outcome == "active"


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_a_late_pass_without_gradients(policy: str, at: int) -> None:
    """A loss cached from pass 1, or a batch that is used up: a step from no gradient would count as one."""
    params = with_biases()
    opt = GXPO(torch.optim.AdamW(params, lr=0.05), optimizer_state=policy)
    step(opt, params, batches(1)[0])
    calls: list[int] = []

    def closure() -> float:
        calls.append(0)
        if len(calls) < at:
            mlp(params, batches(1)[0]).backward()
        return 1.0

    refused(opt, params, closure, "no parameter has a gradient: was backward")


@pytest.mark.parametrize("how", ["step()", "step(closure)", "passes()"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_inside_the_closure(at: int, how: str) -> None:
    """optimizer.step() left in the closure by habit would take a step of its own at every pass."""
    params = with_biases()
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    step(opt, params, batches(1)[0])
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(0)
        loss = mlp(params, batches(1)[0])
        loss.backward()
        if len(calls) == at:
            {"step()": opt.step, "step(closure)": lambda: opt.step(closure), "passes()": lambda: next(opt.passes())}[
                how
            ]()
        return loss

    refused(opt, params, closure, "needs a closure" if how == "step()" else "another step in the middle of a step")


def test_gxpo_around_gxpo_and_a_step_of_another_inside_the_closure() -> None:
    """The first would take nine gradients for one step; the second is bilevel training, and must not mix the two."""
    params, inner = with_biases(), [torch.ones(3, dtype=torch.float64, requires_grad=True)]
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    with pytest.raises(TypeError, match="got <class 'gxpo.GXPO'>"):
        GXPO(opt)
    alone = with_biases()
    twin = GXPO(torch.optim.AdamW(alone, lr=0.05))
    other = GXPO(torch.optim.SGD(inner, lr=0.1))
    for x in batches(3):

        def with_another(params: list[Tensor], x: Tensor) -> Tensor:
            step(other, inner, x, lambda own, _: (own[0] ** 2).sum())
            return mlp(params, x)

        step(opt, params, x, with_another)
        step(twin, alone, x)
        assert opt.report == twin.report
    assert same(params, alone)
    assert other.gate_state.step == 9


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_in_the_closure_is_harmless(set_to_none: bool) -> None:
    """Every closure written for LBFGS has one. Zeroing in place must not write to the gradients that GXPO keeps."""
    ours, theirs = with_biases(), with_biases()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = GXPO(torch.optim.AdamW([*ours, unused], lr=0.05), gate=Gate("disagreement"))
    twin = GXPO(torch.optim.AdamW(theirs, lr=0.05), gate=Gate("disagreement"))
    for x in batches(3):

        def zeroed(params: list[Tensor], x: Tensor) -> Tensor:
            opt.zero_grad(set_to_none=set_to_none)
            return mlp(params, x)

        step(opt, ours, x, zeroed)
        step(twin, theirs, x)
        assert opt.report == twin.report
    assert same(ours, theirs)
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
