"""What goes wrong inside a step, and what users get wrong. The rule: a clear error, and nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gxpo
from gxpo import GXPO, Gate


class Restless(torch.optim.Optimizer):
    """Keeps its state as awkwardly as optimizers outside torch do: entries that come later, tensors replaced and not
    written to, nested lists, counters in the groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group[f"seen {group['k']}"] = True
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state["mean"] + p.grad if "mean" in state else p.grad.clone()
                state.setdefault("norms", []).append(p.grad.norm().item())
                state[f"step {group['k']}"] = p.detach().clone()
                p.sub_(group["lr"] * state["mean"])


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=False),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "restless": Restless,
}


class Case:
    """A tiny problem; `snapshot` holds everything that must survive a failed step, tensor identities included."""

    def __init__(self, base: Callable[..., torch.optim.Optimizer] = BASES["adamw"], **settings: Any) -> None:
        self.params = [torch.ones(3, 2, requires_grad=True), torch.full((4,), 2.0, requires_grad=True)]
        self.opt = GXPO(base(self.params), **settings)
        self.calls = 0

    def closure(self, fail_at: int = -1, how: Any = None) -> Callable[[], Tensor]:
        self.calls = 0

        def run() -> Tensor:
            self.calls += 1
            loss = sum((p * p * p).sum() for p in self.params)
            loss.backward()
            if self.calls == fail_at:
                return how(self, loss)
            return loss

        return run

    def step(self) -> None:
        self.opt.step(self.closure())

    def snapshot(self) -> dict[str, Any]:
        base = self.opt.base
        return {
            "params": [(id(p), p.detach().clone()) for p in self.params],
            "state": {
                id(p): {k: (isinstance(v, Tensor) and id(v), copy.deepcopy(v)) for k, v in s.items()}
                for p, s in base.state.items()
            },
            "groups": [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in base.param_groups],
            "gate": self.opt.gate_state,
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def boom(case: Case, loss: Tensor) -> Tensor:
    raise ZeroDivisionError("out of memory, say")


def interrupt(case: Case, loss: Tensor) -> Tensor:
    raise KeyboardInterrupt


def poison_gradient(case: Case, loss: Tensor) -> Tensor:
    case.params[0].grad[0, 0] = float("nan")
    return loss


def poison_loss(case: Case, loss: Tensor) -> Tensor:
    return loss * float("inf")


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


# ---------------------------------------------------------------------------------------------- what users get wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 1}, "horizon must be an int >= 2, got 1"),
        ({"horizon": 2.0}, "horizon must be an int >= 2, got 2.0"),
        ({"horizon": True}, "horizon must be an int >= 2, got True"),
        ({"alpha": -0.1}, "alpha must be a number >= 0, got -0.1"),
        ({"alpha": float("nan")}, "alpha must be a number >= 0, got nan"),
        ({"estimator": "secant"}, r"estimator must be one of .*tensor.*, got 'secant'"),
        ({"optimizer_state": "reset"}, r"optimizer_state must be one of .*restore.*, got 'reset'"),
        ({"max_grad_norm": 0}, "max_grad_norm must be None or a number > 0, got 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be None or a number > 0, got inf"),
        ({"rollback": None}, "rollback must be True or False, got None"),
        ({"replay_rng": 1}, "replay_rng must be True or False, got 1"),
        ({"gate": 3.0}, r"gate must be None \(never\) or a Gate, got 3.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "entropy"}, r"statistic must be one of .*supplied.*, got 'entropy'"),
        ({"baseline": "mean"}, r"baseline must be one of .*ema.*, got 'mean'"),
        ({"window": 1}, "window must be an int >= 2, got 1"),
        ({"omega": 0.0}, r"omega must be a number in \(0, 1\], got 0.0"),
        ({"threshold": 0}, "threshold must be a number > 0, got 0"),
        ({"patience": 0}, "patience must be an int >= 1, got 0"),
        ({"two_sided": 1}, "two_sided must be True or False, got 1"),
        ({"warmup": -1}, "warmup must be an int >= 0, got -1"),
        ({"cooldown": 1.5}, "cooldown must be None or an int >= 0, got 1.5"),
        ({"max_active_steps": -1}, "max_active_steps must be None or an int >= 0, got -1"),
        ({"level": 0}, "level must be None or a number > 0, got 0"),
    ],
)
def test_bad_gates_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**arguments)


def test_bases_that_cannot_be_wrapped() -> None:
    theta = torch.ones(2, requires_grad=True)
    for base in (torch.optim.LBFGS([theta]), GXPO(torch.optim.SGD([theta], lr=0.1)), [theta]):
        with pytest.raises(TypeError, match="base must be a torch.optim.Optimizer that steps without a closure"):
            GXPO(base)
    spin = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real parameters only, got torch.complex64"):
        GXPO(torch.optim.SGD([spin], lr=0.1))


class OnlyWraps(torch.optim.Optimizer):
    """As accelerate prepares them: an Optimizer by name, with nothing that its class's constructor makes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults


def test_a_base_that_only_wraps_another_is_refused() -> None:
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"only wraps an optimizer: give that one to GXPO, and GXPO to prepare\(\)"):
        GXPO(OnlyWraps(torch.optim.SGD([theta], lr=0.1)))


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


def refused(case: Case, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """The error, and everything as it was, and a good step afterwards."""
    before = case.snapshot()
    with pytest.raises(error, match=message):
        call()
    assert same(case.snapshot(), before)
    case.opt.step(case.closure())
    assert case.opt.report.outcome == "active"


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


def test_checkpoints_from_the_future_are_refused() -> None:
    case = Case()
    saved = case.opt.state_dict()
    saved["gxpo"] = {"version": "9.0", "gate": {"step": 3, "mood": 1.0}}
    refused(case, ValueError, r"cannot read \['mood'\], saved by 9.0", lambda: case.opt.load_state_dict(saved))


# ---------------------------------------------------------------------- what must not change between the passes


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


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


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
