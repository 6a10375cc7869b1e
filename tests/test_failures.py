"""If these fail, a step that does not come to its end loses something: exceptions, NaN, a loop that is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from failing import BASES, Case, boom, interrupt, refused, same
from torch import Tensor

import gxpo
from gxpo import GXPO, Gate

# ----------------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", [boom, interrupt])
def test_an_exception_leaves_no_trace(how: Any, warm: bool, at: int, base: str, policy: str) -> None:
    """If it did, an out-of-memory or Ctrl-C in mid-step would leave a model at theta1 and a state that is ahead."""
    case, twin = (Case(BASES[base], optimizer_state=policy) for _ in range(2))
    if warm:
        case.step(), twin.step()
    before = case.snapshot()
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        case.opt.step(case.closure(at, how))
    assert same(case.snapshot(), before)
    case.step(), twin.step()  # and training goes on as if it had never been tried
    assert same([p.detach() for p in case.params], [p.detach() for p in twin.params])


@pytest.mark.parametrize("base", BASES)
def test_an_exception_in_the_base_optimizer_leaves_no_trace(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own step can run out of memory as well, in the middle of the parameters."""
    case = Case(BASES[base])
    case.step()
    before = case.snapshot()
    real = case.opt.base.step
    for at in (1, 2, 3):
        calls = []

        def failing(at: int = at, calls: list = calls) -> None:
            calls.append(0)
            real()
            if len(calls) == at:
                raise MemoryError

        monkeypatch.setattr(case.opt.base, "step", failing)
        with pytest.raises(MemoryError):
            case.step()
        assert same(case.snapshot(), before)


def test_without_rollback_parameters_return_and_the_state_does_not() -> None:
    """What rollback=False gives up, and nothing more."""
    case = Case(rollback=False)
    case.step()
    before = case.snapshot()
    with pytest.raises(ZeroDivisionError):
        case.opt.step(case.closure(3, boom))
    after = case.snapshot()
    assert same(after["params"], before["params"])
    assert not same(after["state"], before["state"])


class Counts(torch.optim.SGD):
    """A counter of steps beside the parameters' state, as some optimizers outside torch keep it."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.state["steps"] = self.state.get("steps", 0) + 1


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_state_that_belongs_to_no_parameter(policy: str) -> None:
    case = Case(lambda p: Counts(p, lr=0.1), optimizer_state=policy)
    case.step()
    assert case.opt.state["steps"] == {"keep": 3, "restore": 1}[policy]
    with pytest.raises(KeyboardInterrupt):
        case.opt.step(case.closure(fail_at=3, how=interrupt))
    assert case.opt.state["steps"] == {"keep": 3, "restore": 1}[policy]


def test_a_hook_that_fails_after_the_step_does_not_spoil_the_next() -> None:
    """The step is done and counted; what it left in .grad is its own, not forgotten micro-batches."""
    case = Case()

    def fails(*_: Any) -> None:
        raise OSError("the log's disk is full")

    def loop() -> None:
        run = case.closure()
        for _ in case.opt.passes():
            run()

    handle = case.opt.register_step_post_hook(fails)
    with pytest.raises(OSError, match="disk is full"):
        loop()
    handle.remove()
    assert case.opt.report.outcome == "active"
    case.step()
    assert case.opt.gate_state.step == 2


# --------------------------------------------------------------------------------- numbers that are not finite, or zero


def poison_gradient(case: Case, loss: Tensor) -> Tensor:
    case.params[0].grad[0, 0] = float("nan")
    return loss


def poison_loss(case: Case, loss: Tensor) -> Tensor:
    return loss * float("inf")


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("how", [poison_gradient, poison_loss])
def test_a_late_non_finite_pass_becomes_a_single_pass(how: Any, at: int, policy: str) -> None:
    """If not, one bad batch would leave NaN weights (or lose the batch although its first gradient was fine)."""
    case, twin = Case(optimizer_state=policy), Case(gate=Gate("never", max_active_steps=0))
    case.opt.step(case.closure(at, how))
    twin.step()
    assert (case.opt.report.outcome, case.opt.report.passes) == ("rolled back", at + 1)
    assert f"in pass {at}" in case.opt.report.why
    assert same([p.detach() for p in case.params], [p.detach() for p in twin.params])
    assert case.opt.gate_state.seen == 0
    assert case.opt.gate_state.active_steps == 0


@pytest.mark.parametrize("how", [poison_gradient, poison_loss])
@pytest.mark.parametrize("gate", [None, Gate("never", max_active_steps=0)])
def test_a_non_finite_first_pass_is_skipped(how: Any, gate: Gate | None) -> None:
    """Also after fallback: a NaN step would be the end of the run."""
    case = Case(gate=gate)
    before = {**case.snapshot(), "gate": None}
    case.opt.step(case.closure(1, how))
    assert same({**case.snapshot(), "gate": None}, before)
    assert (case.opt.report.outcome, case.opt.report.passes) == ("skipped", 1)
    assert case.opt.report.metrics()["gxpo/skipped"] == 1.0


def test_a_repeat_that_is_non_finite_too_is_skipped() -> None:
    case = Case()
    before = case.snapshot()
    calls = []

    def closure() -> Tensor:
        calls.append(0)
        loss = case.closure()()
        return loss if len(calls) == 1 else loss * float("nan")

    case.opt.step(closure)
    assert case.opt.report.outcome == "skipped"
    assert case.opt.report.why == "non-finite loss in pass 2, then non-finite loss in pass 3"
    assert same(case.snapshot()["params"], before["params"])


def test_a_loss_is_of_its_own_pass() -> None:
    """Handed in before the pass is taken in; one kept from an earlier pass would fail or save another."""
    case = Case(gate=None)
    for turn in range(4):
        case.opt.zero_grad()
        case.closure()()
        if turn == 1:
            case.opt.observe(loss=float("inf"))
        if not case.opt.lookahead():
            break
    case.opt.step()
    assert case.opt.report.outcome == "rolled back"
    assert case.opt.report.why == "non-finite loss in pass 2"


def test_a_zero_gradient_is_an_ordinary_step() -> None:
    """All advantages zero is common in GRPO: no division by zero, no observation, momentum goes on."""
    theta, twin = (torch.ones(3, requires_grad=True) for _ in range(2))
    opt, base = GXPO(BASES["sgd"]([theta])), BASES["sgd"]([twin])
    for scale in (1.0, 0.0):
        theta.grad = twin.grad = None
        opt.gate_state = gxpo.GateState()
        (twin.sum() * scale).backward()
        base.step()
    for scale in (1.0, 0.0):
        opt.gate = Gate("never", max_active_steps=0) if scale else Gate()
        opt.step(lambda scale=scale: (loss := theta.sum() * scale, loss.backward())[0])
    assert (opt.report.outcome, opt.report.why, opt.report.passes) == ("single", "zero gradient", 1)
    assert opt.gate_state.seen == 0
    assert torch.equal(theta, twin)


def test_a_loss_of_exactly_zero_is_a_loss() -> None:
    """`if loss:` is a common mistake; the loss at theta0 is 0 in on-policy GRPO."""
    theta = torch.ones(2, requires_grad=True)
    opt = GXPO(torch.optim.SGD([theta], lr=0.1))
    loss = opt.step(lambda: (value := (theta - theta.detach()).sum(), value.backward())[0])
    assert loss.item() == 0.0
    assert opt.report.loss == 0.0
    assert opt.report.outcome == "active"


# ------------------------------------------------------------------------------------ steps that are left, or left open


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_passes_left_half_way(turns: int) -> None:
    """A break in the loop would otherwise train nothing, silently, for ever."""
    case = Case()
    case.step()
    before = case.snapshot()

    def leave() -> None:
        for n in case.opt.passes():
            case.closure()()
            if n == turns - 1:
                break

    leave()
    assert same(case.snapshot(), before)
    refused(case, RuntimeError, "left before its end, and everything was put back", case.step)
    leave()
    case.opt.abort()  # meant
    case.step()


@pytest.mark.parametrize("leaves", [True, False])
def test_abort_inside_passes(leaves: bool) -> None:
    """Going on would take the loop's next turn for the first of another step, which nobody clips."""
    case = Case(max_grad_norm=0.1)
    before = case.snapshot()

    def loop() -> None:
        for _ in case.opt.passes():
            case.closure()()
            case.opt.abort()
            if leaves:
                break

    if leaves:  # meant, and said so: the next step is not stopped
        loop()
        assert same(case.snapshot(), before)
        case.step()
        assert case.opt.report.outcome == "active"
    else:
        refused(case, RuntimeError, r"abort\(\) was called inside the loop: leave it", loop)


@pytest.mark.parametrize("interface", ["closure", "passes"])
def test_a_loop_dropped_earlier_does_not_touch_a_later_step(interface: str) -> None:
    """A traceback keeps the failed loop alive; when it goes, in the middle of a healthy step, that step stays whole."""
    case, twin = Case(), Case()
    kept: list[Any] = [case.opt.passes()]
    next(kept[0])
    case.opt.abort()

    def closure() -> Tensor:
        kept.clear()  # the interpreter closes the dropped loop here
        return run()

    run = case.closure()
    if interface == "closure":
        case.opt.step(closure)
    else:
        for _ in case.opt.passes():
            closure()
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(case.params, twin.params, strict=True))
    assert case.opt.report.outcome == "active"
    case.step()  # nor does it make the next one raise


def test_eval_in_the_middle_of_a_step() -> None:
    """A schedule-free base would swap its weights under the passes."""
    case = Case()
    case.closure()()
    case.opt.lookahead()
    with pytest.raises(RuntimeError, match=r"eval\(\) in the middle of a step"):
        case.opt.eval()
    case.opt.abort()


def test_a_step_left_open_by_lookahead() -> None:
    case = Case()
    case.closure()()
    before = case.snapshot()
    assert case.opt.lookahead()
    for call in (case.opt.state_dict, lambda: copy.deepcopy(case.opt), lambda: case.opt.load_state_dict({})):
        with pytest.raises(RuntimeError, match="in the middle of a step: finish it, or call abort"):
            call()
    case.opt.abort()
    assert same(case.snapshot(), before)
    case.opt.abort()  # harmless
    case.step()


def test_lookahead_after_its_end() -> None:
    case = Case()
    case.closure()()
    while case.opt.lookahead():
        case.closure()()
    with pytest.raises(RuntimeError, match="lookahead\\(\\) has returned False: call step\\(\\) now"):
        case.opt.lookahead()
    case.opt.step()
    assert case.opt.report.outcome == "active"
