"""If these fail, the oracle is changed by a step that failed, by its caller's arrays, or by being saved and loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracle_cases import ADAMW, EMA, GATE, SGD, arrays, config, same, scripted

from gxpo_reference.oracle import Arrays, Oracle

# ---- When something goes wrong ---------------------------------------------------------------------------------------

MOMENTUM = SGD | {"momentum": 0.9, "weight_decay": 0.1}


def quadratic(p: Arrays) -> tuple[float, Arrays]:
    return float(np.sum(p["w"] ** 2)), {"w": 2 * p["w"]}


def running(optimizer: dict, steps: int = 6, **changes: Any) -> Oracle:
    """An oracle with a history: in the middle of a streak, with a filled optimizer state."""
    gate = GATE | {"patience": 3} | changes
    oracle = Oracle(arrays(w=[1.0, -2.0]), config(optimizer=optimizer, optimizer_state="keep", gate=gate))
    for h in [1, 3, 1, 3, 6, 6][:steps]:
        oracle.step(quadratic, supplied=h)
    return oracle


def twin(oracle: Oracle) -> Oracle:
    return copy.deepcopy(oracle)


def breaking(at: int, loss: float = 0.0, bad: float = 0.0, error: BaseException | None = None) -> Callable:
    """quadratic, but pass `at` has another loss, a bad number in its gradient, or raises."""
    count = 0

    def grad(p: Arrays) -> tuple[float, Arrays]:
        nonlocal count
        count += 1
        value, g = quadratic(p)
        if count == at:
            p["w"][:] = -77.0  # a port that works in place would now stand elsewhere
            if error is not None:
                raise error
            g["w"][0] += bad
            value += loss
        return value, g

    return grad


failures = pytest.mark.parametrize(
    "failure",
    [{"loss": math.nan}, {"loss": -math.inf}, {"bad": math.nan}, {"bad": math.inf}],
    ids=["loss nan", "loss inf", "gradient nan", "gradient inf"],
)
both_optimizers = pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["sgd", "adamw"])
history = pytest.mark.parametrize("steps", [0, 6], ids=["fresh", "mid-streak"])


@both_optimizers
@failures
@history
@pytest.mark.parametrize("at", [2, 3])
def test_nonfinite_probe_leads_to_the_single_pass_step_and_leaves_no_trace(
    optimizer: dict, failure: dict, at: int, steps: int
) -> None:
    """Otherwise one bad batch leaves weights or moments displaced, or feeds the gate a NaN."""
    oracle = running(optimizer, steps)
    single, before = twin(oracle), oracle.save()
    single.rules = GATE | {"max_active_steps": 0}
    trace, want = oracle.step(breaking(at, **failure), supplied=50.0), single.step(quadratic)
    assert (trace.outcome, trace.passes, want.outcome) == ("rolled back", at, "single")
    assert trace.why == f"non-finite {'loss' if 'loss' in failure else 'gradient'} in pass {at}"
    assert same(oracle.params, want.points["theta'"])
    assert same(trace.points["theta'"], want.points["theta'"])
    assert same(trace.states["s'"], want.states["s'"])
    after = oracle.save()
    assert same(after["optimizer"], single.save()["optimizer"])
    assert same(after["gate"], before["gate"])
    assert after["steps"] == before["steps"] + 1
    assert (trace.statistic, trace.z) == (None, None)
    assert len(trace.clips) == at - 1


@both_optimizers
@failures
@history
def test_nonfinite_first_pass_is_skipped_and_changes_nothing(optimizer: dict, failure: dict, steps: int) -> None:
    """Not even weight decay or momentum may act on a step that has no gradient; in fallback too."""
    for changes in ({}, {"max_active_steps": steps}):
        oracle = running(optimizer, steps, **changes)
        before = oracle.save()
        trace = oracle.step(breaking(1, **failure), supplied=50.0)
        assert (trace.outcome, trace.passes, trace.clips) == ("skipped", 1, [])
        assert trace.why.endswith("in pass 1")
        assert same(oracle.save(), before | {"steps": before["steps"] + 1})


@both_optimizers
@history
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyboardInterrupt()], ids=["oom", "ctrl-c"])
def test_exception_leaves_everything_as_it_was_and_goes_on_its_way(
    optimizer: dict, steps: int, at: int, error: BaseException
) -> None:
    """The caller who catches it and retries must be on the same path as one to whom it never happened."""
    oracle = running(optimizer, steps)
    untouched, before = twin(oracle), oracle.save()
    with pytest.raises(type(error)):
        oracle.step(breaking(at, error=error), supplied=2.0)
    assert same(oracle.save(), before)
    assert same(oracle.step(quadratic, supplied=2.0), untouched.step(quadratic, supplied=2.0))


def test_exception_in_fallback_leaves_everything_as_it_was() -> None:
    oracle = running(ADAMW, 6, max_active_steps=2)
    before = oracle.save()
    with pytest.raises(MemoryError):
        oracle.step(breaking(1, error=MemoryError()))
    assert same(oracle.save(), before)


@both_optimizers
def test_zero_gradient_is_an_ordinary_step_that_the_gate_does_not_see(optimizer: dict) -> None:
    """All advantages zero is common in GRPO: momentum and decay act once, no probes, no observation."""
    oracle = running(optimizer)
    single, before = twin(oracle), oracle.save()
    single.rules = GATE | {"max_active_steps": 0}
    trace = oracle.step(scripted(arrays(w=[0, 0])), supplied=50.0)
    want = single.step(scripted(arrays(w=[0, 0])))
    assert (trace.outcome, trace.why, trace.passes, trace.streak) == ("single", "zero gradient", 1, 2)
    assert same(oracle.params, want.points["theta'"])
    assert not same(oracle.params, before["params"])
    assert same(oracle.save()["gate"], before["gate"])


def test_interrupted_streak_goes_on_as_if_the_failed_steps_had_not_been() -> None:
    """Steps that observe nothing are no evidence of calm."""
    oracle = running(MOMENTUM)
    oracle.step(breaking(3, bad=math.nan), supplied=0.0)
    oracle.step(breaking(1, bad=math.nan), supplied=0.0)
    trace = oracle.step(quadratic, supplied=6.0)
    assert (trace.streak, trace.tripped, trace.step, trace.baseline) == (3, True, 8, (2.0, 1.0))


@pytest.mark.parametrize("bad", [arrays(w=[1, 2, 3]), arrays(v=[1, 2]), arrays(w=[1, 2], v=[1]), {}])
def test_gradient_of_other_names_or_shapes_is_refused(bad: Arrays) -> None:
    """Broadcasting would turn it into a wrong answer."""
    oracle = running(MOMENTUM)
    before = oracle.save()
    with pytest.raises(ValueError, match="names and shapes"):
        oracle.step(scripted(bad), supplied=1.0)
    assert same(oracle.save(), before)


def test_loss_that_works_in_place_and_reuses_its_buffers_changes_nothing() -> None:
    """The record must show what was asked and received, not what the arrays hold later."""
    buffer = arrays(w=[0.0, 0.0])

    def in_place(p: Arrays) -> tuple[float, Arrays]:
        value, g = quadratic(p)
        buffer["w"][:] = g["w"]
        p["w"][:] = math.nan
        return value, buffer

    oracle, clean = running(ADAMW), running(ADAMW)
    trace, want = oracle.step(in_place, supplied=2.0), clean.step(quadratic, supplied=2.0)
    buffer["w"][:] = math.nan
    assert same(trace, want)
    assert same(oracle.save(), clean.save())


def test_what_the_caller_holds_is_a_copy() -> None:
    """Editing the start values, the config, a trace or a saved state must not reach into the oracle."""
    start, settings_ = arrays(w=[1.0, -2.0]), config(optimizer=ADAMW)
    oracle, clean = Oracle(start, settings_), Oracle(copy.deepcopy(start), copy.deepcopy(settings_))
    start["w"][:], settings_["optimizer"]["betas"][0] = 9.0, 0.0
    trace, saved = oracle.step(quadratic), oracle.save()
    clean.step(quadratic)
    for held in (*trace.points.values(), *trace.asked, trace.states["s'"]["exp_avg"], saved["params"]):
        held["w"][:] = 9.0
    saved["optimizer"]["exp_avg"]["w"][:] = 9.0
    assert same(oracle.save(), clean.save())
    saved = oracle.save()
    oracle.load(saved)
    saved["params"]["w"][:] = saved["optimizer"]["exp_avg"]["w"][:] = 9.0
    assert same(oracle.step(quadratic), clean.step(quadratic))


# ---- Save and load ---------------------------------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("changes", [{}, EMA, {"patience": 2, "cooldown": 2}], ids=str)
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_resumed_run_is_the_uninterrupted_one(optimizer: dict, changes: dict, at: int) -> None:
    """Also from the middle of a streak or a cooldown: pin, history, moments and step number all travel."""
    hs = [1, 3, 1, 3, 6, 6, 2, 9, 9, 9, 9, 9]
    oracle = running(optimizer, 0, **changes)
    for h in hs[:at]:
        oracle.step(quadratic, supplied=h)
    saved = oracle.save()
    kept = copy.deepcopy(saved)
    going_on = [oracle.step(quadratic, supplied=h) for h in hs[at:]]
    resumed = running(optimizer, 0, **changes)
    resumed.load(saved)
    assert same([resumed.step(quadratic, supplied=h) for h in hs[at:]], going_on)
    assert same(saved, kept)


def test_saved_state_is_plain() -> None:
    """Dicts, arrays and scalars only, so that any format can hold it."""

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return value is None or type(value) in (bool, int, float, str, np.ndarray)

    assert plain(running(ADAMW).save())


def test_state_of_other_parameters_is_refused() -> None:
    saved = Oracle(arrays(v=[1.0]), config()).save()
    with pytest.raises(ValueError, match="names and shapes"):
        Oracle(arrays(w=[1.0]), config()).load(saved)
