"""If these fail, a step that is used wrongly trains something, or costs what was there before it, without an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from failing import Case, refused, same

from gxpo import GXPO, Gate


def test_step_without_a_closure() -> None:
    case = Case()
    refused(case, RuntimeError, "step\\(\\) needs a closure that runs forward and backward", case.opt.step)


def test_a_closure_that_returns_nothing() -> None:
    case = Case()
    refused(case, TypeError, "the closure must return the loss, got None", lambda: case.opt.step(lambda: None))


def test_a_loss_that_is_no_scalar() -> None:
    case = Case()
    refused(
        case,
        ValueError,
        r"loss must be a scalar, got a tensor of shape \(2,\)",
        lambda: case.opt.step(lambda: torch.ones(2)),
    )


def test_no_gradients_at_all() -> None:
    case = Case()
    refused(case, RuntimeError, "no parameter has a gradient: was backward", lambda: case.opt.step(lambda: 1.0))
    refused(case, RuntimeError, "no parameter has a gradient", lambda: [None for _ in case.opt.passes()])
    case.opt.zero_grad()
    refused(case, RuntimeError, "no parameter has a gradient", case.opt.lookahead)


@pytest.mark.parametrize("inner", ["step(closure)", "passes()", "step()"])
def test_a_step_inside_passes(inner: str) -> None:
    """An optimizer.step() left in the loop by habit must not take a fourth step or mix two steps' gradients."""
    case = Case()
    calls: dict[str, tuple[Callable[[], Any], str]] = {
        "step(closure)": (lambda: case.opt.step(case.closure()), "another step in the middle of a step"),
        "passes()": (lambda: next(case.opt.passes()), "another step in the middle of a step"),
        "step()": (case.opt.step, "passes\\(\\) calls it by itself"),
    }

    def nested() -> None:
        try:
            for _ in case.opt.passes():
                case.closure()()
                calls[inner][0]()
        except RuntimeError:
            case.opt.abort()  # caught: the next step may go on
            raise

    refused(case, RuntimeError, calls[inner][1], nested)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_enabled_grad_scaler_is_refused(as_keyword: bool) -> None:
    """It would silently step on scaled gradients, or hide skipped inner steps."""
    case = Case()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))  # makes its scale
    case.closure()()
    before = case.snapshot()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(case.opt, closure=case.closure()) if as_keyword else scaler.step(case.opt, case.closure())
    assert same(case.snapshot(), before)
    case.opt.zero_grad()
    case.step()
    torch.amp.GradScaler("cpu", enabled=False).step(case.opt, case.closure())
    assert case.opt.report.outcome == "active"


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    opt = GXPO(torch.optim.SGD(table.parameters(), lr=0.1))
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="dense real gradients only, got torch.sparse_coo torch.float32"):
        opt.step(lambda: (loss := table(torch.tensor([1, 2])).sum(), loss.backward())[0])
    assert torch.equal(table.weight, before)


def test_complex_parameters_added_later_are_refused() -> None:
    theta, spin = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex64, requires_grad=True)
    opt = GXPO(torch.optim.SGD([theta], lr=0.1))
    opt.add_param_group({"params": [spin]})
    with pytest.raises(TypeError, match="dense real gradients only, got torch.strided torch.complex64"):
        opt.step(lambda: (loss := theta.sum() + spin.abs().sum(), loss.backward())[0])
    assert torch.equal(theta, torch.ones(2))


def test_a_supplied_statistic_that_never_comes() -> None:
    case = Case(gate=Gate("supplied"))
    before = case.snapshot()
    with pytest.raises(RuntimeError, match="call observe\\(statistic=...\\) in the first pass"):
        case.step()
    with pytest.raises(ValueError, match="statistic must be a finite number, got nan"):
        case.opt.observe(statistic=torch.tensor(float("nan")))
    assert same(case.snapshot(), before)
    case.opt.observe(statistic=1.5)
    case.opt.observe(statistic=7.0)  # not measured at theta0
    case.step()
    assert case.opt.report.statistic == 1.5


@pytest.mark.parametrize("warm", [False, True])
def test_gradients_of_zeros_made_beforehand_are_no_gradients(warm: bool) -> None:
    """Some trainers allocate .grad themselves, so that it lies where they want it."""
    case = Case()
    if warm:
        case.step()
    for p in case.params:
        p.grad = torch.zeros_like(p)
    case.step()
    assert case.opt.report.outcome == "active"


@pytest.mark.parametrize("interface", ["closure", "passes"])
def test_gradients_from_before_a_step_are_not_dropped_in_silence(interface: str) -> None:
    """The first micro-batches, accumulated outside the closure, would be zeroed away and the run look healthy. What a
    step itself has left in .grad is old, and so is what was zeroed."""
    case = Case()

    def step() -> None:
        if interface == "closure":
            case.step()
            return
        run = case.closure()
        for _ in case.opt.passes():
            run()

    for _ in range(2):
        step()
    case.opt.zero_grad(set_to_none=False)
    step()
    case.opt.zero_grad()
    case.closure()()
    before, grads = case.snapshot(), [p.grad.clone() for p in case.params]
    with pytest.raises(RuntimeError, match="there are gradients that no pass has made, and this step would lose them"):
        step()
    assert same(case.snapshot(), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(case.params, grads, strict=True))
    case.opt.zero_grad()
    step()
    assert case.opt.report.active
