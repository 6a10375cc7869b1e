"""If these fail, "any torch optimizer" is true of some only: others' optimizers under GXPO, as they are installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_by_hand import ByHand, built, copied, differences, loss_of, numbers, record, seed, start, take_step
from zoo_kinds import CLOSURES, KINDS, LEFT_OUT, OWN_COPY, WRAPPERS, Kind, classes, imported

import gxpo
from gxpo import GXPO

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),  # the packages' own
    pytest.mark.usefixtures("uncompiled"),
]
POLICY = pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
PACKAGES = sorted({kind.package for kind in KINDS})


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """torch.compile would take minutes, for steps that are the same."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if set_stance is None:
        yield
        return
    set_stance("force_eager")
    yield
    set_stance("default")


def of_kinds(*kinds: Kind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=str)


def wrapped(kind: Kind, policy: str, values: list[Tensor] | None = None) -> tuple[GXPO, list[Tensor]]:
    params, base = built(kind.make, values or start(kind.shapes, kind.dtype))
    return GXPO(base, gate=None, optimizer_state=policy), params


def assert_close(got: list[Tensor], right: list[Tensor], origin: list[Tensor]) -> None:
    """To a part of what was moved, and to the rounding of what is stored."""
    for a, b, o in zip(got, right, origin, strict=True):
        part = 1e-6 if b.dtype == torch.float64 else 1e-3
        moved = (b.detach() - o.detach()).double().abs().max()
        rounding = 8 * torch.finfo(b.dtype).eps * b.detach().double().abs().max()
        off = (a.detach().double() - b.detach().double()).abs().max()
        assert off.item() <= (part * moved + rounding).item()


# ------------------------------------------------------------------------------------------------------------- the step


@POLICY
@of_kinds(*(kind for kind in KINDS if kind.package != "torch.optim"))  # those are in test_base_optimizers.py
def test_the_step_of_the_formulas(kind: Kind, policy: str) -> None:
    """If not, its counters, schedules and moments would be ahead of the steps made, or not those of the point used."""
    opt, params = wrapped(kind, policy)
    hand = ByHand(kind.make, start(kind.shapes, kind.dtype), policy)
    origin = [p.detach().clone() for p in params]
    for n in range(4):
        take_step(opt, params, n)
        hand.step(n)
        assert opt.report.outcome == "active"
        assert_close(params, hand.params, origin)
    ours, theirs = numbers(record(opt.base, params)), numbers(record(hand.base, hand.params))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}[params[0].dtype]
    assert [path for path in theirs if path not in ours] == []
    alike = {path: torch.allclose(ours[path], right, rtol=tolerance, atol=tolerance) for path, right in theirs.items()}
    assert [path for path, is_alike in alike.items() if not is_alike] == []


# ---------------------------------------------------------------------------------------------------- a step that fails


@POLICY
@of_kinds(*KINDS)
def test_a_failed_step_leaves_no_trace(kind: Kind, policy: str) -> None:
    """If it did, an out-of-memory or Ctrl-C in mid-step would leave moments, counters or masks of steps that were not
    made, or tensors that the optimizer no longer looks at."""
    (opt, params), (twin, theirs) = wrapped(kind, policy), wrapped(kind, policy)
    for n in range(2):
        for at in (2, 3):
            before = record(opt.base, params)
            with pytest.raises(ZeroDivisionError):
                take_step(opt, params, n, fail_in_pass=at)
            assert differences(before, record(opt.base, params)) == []
        take_step(opt, params, n)
        take_step(twin, theirs, n)
        assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------------- checkpoints


@POLICY
@of_kinds(*(kind for kind in KINDS if kind.resumes))
def test_a_resumed_run_goes_on_as_by_hand(kind: Kind, policy: str) -> None:
    """If not, state_dict() would lack something that the base's own has, or load_state_dict() would bring too much."""
    old, params = wrapped(kind, policy)
    origin = [p.detach().clone() for p in params]
    for n in range(2):
        take_step(old, params, n)
    values, saved = [p.detach().clone() for p in params], copied(old.state_dict())
    new, ours = wrapped(kind, policy, values)
    new.load_state_dict(saved)
    hand = ByHand(kind.make, values, policy, copied(old.base.state_dict()))
    for n in range(2, 4):
        take_step(new, ours, n)
        hand.step(n)
        assert_close(ours, hand.params, origin)


# -------------------------------------------------------------------------------------------------------------- refused


def refused(opt: Callable[[], GXPO], params: list[Tensor], base: Any, error: Any) -> Exception:
    """At once or in the first step, and then nothing has been lost."""
    before = record(base, params)
    with pytest.raises(error) as caught:
        take_step(opt(), params, 0)
    assert differences(before, record(base, params)) == []
    return caught.value


@POLICY
@of_kinds(*OWN_COPY)
def test_weights_from_a_copy_of_its_own_are_refused(kind: Kind, policy: str) -> None:
    """It overwrites theta~: three plain steps at three times the price, while the report speaks of a multiplier."""
    params, base = built(kind.make, start(kind.shapes, kind.dtype))
    error = refused(lambda: GXPO(base, gate=None, optimizer_state=policy), params, base, RuntimeError)
    assert re.search(r"\bcop(y|ies)\b|\bown\b|\bmaster\b", str(error)), error


@of_kinds(*OWN_COPY)
def test_these_do_compute_from_a_copy_of_their_own(kind: Kind) -> None:
    """In plain torch: after two steps, the third leads to the same point from another one. If not, why refuse them?"""
    ends = []
    for shift in (0.0, 0.01):
        params, base = built(kind.make, start(kind.shapes, kind.dtype))
        for n in range(3):
            seed(n)
            for p in params:
                p.grad = None
            loss_of(params).backward()
            if n == 2:
                with torch.no_grad():
                    for p in params:
                        p.add_(shift)
            base.step()
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5)


@of_kinds(*WRAPPERS)
def test_an_optimizer_around_another_is_refused(kind: Kind) -> None:
    """Who wraps Lookahead or TRAC is to hear it when wrapping, with its name."""
    params, base = built(kind.make, start(kind.shapes, kind.dtype))
    before = record(base, params)
    with pytest.raises((TypeError, ValueError), match=type(base).__name__):
        GXPO(base)
    assert differences(before, record(base, params)) == []


@of_kinds(*CLOSURES)
def test_an_optimizer_that_wants_a_closure_is_refused(kind: Kind) -> None:
    """GXPO has it step from .grad. Its own complaint will do, if the model is left where it was."""
    params, base = built(kind.make, start(kind.shapes, kind.dtype))
    error = refused(lambda: GXPO(base, gate=None), params, base, Exception)
    assert "closure" in str(error)


# -------------------------------------------------------------------------------------------------------- nobody forgot


@pytest.mark.parametrize("package", PACKAGES)
def test_every_optimizer_of_a_package_is_in_a_list(package: str) -> None:
    """A newer version may bring one that nobody has tried."""
    imported(package)
    tried = {kind.name.split()[0] for kind in (*KINDS, *OWN_COPY, *WRAPPERS, *CLOSURES) if kind.package == package}
    left_out = LEFT_OUT.get(package, {}).keys()
    assert classes(package) - tried - left_out == set()
    assert tried & left_out == set()
    if package != "torch.optim":  # of which older versions have fewer
        assert (tried | left_out) - classes(package) == set()
