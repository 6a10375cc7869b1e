"""The port in JAX and optax: judged by the suite, and used as its docstring says."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import DTYPES, check_capabilities
from gxpo_conformance.runs import play
from gxpo_conformance.search import search
from gxpo_conformance.trial import BLOCKED, NOT_RUN, PASS, UNDECLARED, judge

jax = pytest.importorskip("jax", reason='the JAX port needs jax: pip install -e ".[jax]"')
optax = pytest.importorskip("optax", reason='the JAX port needs optax: pip install -e ".[jax]"')

from gxpo_reference.ports import jax_gxpo  # noqa: E402  (not skipped: if it cannot be imported, that is a failure)

PORT = "gxpo_reference.ports.jax_adapter:Port"


def test_it_is_conformant(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX users would train by a rule that is not GXPO, and the suite would have no port outside torch and numpy.

    It compiles for every setting and shape, so that a whole verdict takes minutes and gigabytes: here float64 alone,
    all fixed cases, of a clause's awkward runs one in eight, of the random ones 12 of 60 and of 140.
    """
    planned = play.planned
    monkeypatch.setattr(play, "planned", lambda clause: planned(clause)[::8])
    monkeypatch.setattr(play, "RANDOM_RUNS", dict.fromkeys(play.RANDOM_RUNS, 12))
    verdict = judge(load(PORT), ["float64"])
    assert verdict.failed == []
    assert verdict.exit_status == 0
    assert verdict.which(BLOCKED, UNDECLARED) == []
    assert verdict.which(NOT_RUN) == ["EST-04"]  # which float32 alone can show


def test_it_is_right_in_its_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX widens and narrows by rules of its own. The fixed cases of the groups about numbers; the gate counts alike
    in every dtype."""
    monkeypatch.setattr(play, "planned", lambda clause: ())
    port = load(PORT)
    assert set(port.capabilities()["dtypes"]) == set(DTYPES)
    verdict = judge(port, ["float32", "bfloat16"], only=["EST", "EXT", "MOV", "COR", "CLP", "OPT"])
    assert verdict.failed == []
    assert verdict.of("EST-04") == PASS


def test_random_cases_do_not_reject_it_in_float32() -> None:
    """It would be right where the fixed cases look and wrong, or out of its budget, elsewhere."""
    port = load(PORT)
    assert search(Harness(port, check_capabilities(port.capabilities()), "float32", "cpu"), 1, 15) is None


def loss_fn(params: Any, batch: Any) -> Any:
    x, y = batch
    hidden = jax.numpy.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return ((hidden @ params["second"] - y) ** 2).mean()


def problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    first = {"w": jax.numpy.asarray(rng.normal(size=(3, 4))), "b": jax.numpy.zeros(4)}
    return {"first": first, "second": jax.numpy.asarray(rng.normal(size=4))}, (
        rng.normal(size=(16, 3)),
        rng.normal(size=16),
    )


def test_nested_parameters_and_a_jitted_loss_work_as_the_docstring_shows() -> None:
    """Nobody's parameters are a flat dict: what the docstring shows would fail on any real model."""
    params, batch = problem()
    gxpo = jax_gxpo.GXPO(
        optax.adamw(1e-2), horizon=5, alpha=0.5, max_grad_norm=1.0, gate=jax_gxpo.Gate(max_active_steps=20)
    )
    state, passes, losses = gxpo.init(params), [], []
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(25):
        params, state, report = gxpo.step(params, state, partial(value_and_grad, batch=batch))
        passes.append(report.passes)
        losses.append(report.loss)
    assert passes == [3] * 20 + [1] * 5
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.structure(params) == jax.tree.structure(problem()[0])


def test_a_loss_that_raises_leaves_nothing_behind() -> None:
    """State and parameters are values: the old ones are still the old ones."""
    params, batch = problem()
    gxpo = jax_gxpo.GXPO(optax.sgd(0.1, momentum=0.9))
    state = gxpo.init(params)
    calls = []

    def failing(theta: Any) -> Any:
        calls.append(theta)
        if len(calls) == 3:
            raise MemoryError("out of it")
        return jax.value_and_grad(loss_fn)(theta, batch)

    before = jax.tree.map(np.array, (params, state.optimizer))
    with pytest.raises(MemoryError):
        gxpo.step(params, state, failing)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((params, state.optimizer)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("optimizer_state", ["keep", "restore"])
@pytest.mark.parametrize("make", [optax.sgd, optax.inject_hyperparams(optax.sgd)], ids=["plain", "inject_hyperparams"])
def test_a_schedule_advances_once_a_step_not_once_a_pass(make: Any, optimizer_state: str) -> None:
    """Warm-up and decay would be over in a third of the steps, and a step's passes would not share a learning rate."""
    gxpo = jax_gxpo.GXPO(
        make(learning_rate=lambda count: 1.0 / (count + 1)),
        horizon=2,  # q = 1 and alpha = 1: theta~ is theta2, and every pass moves by the learning rate
        alpha=1.0,
        optimizer_state=optimizer_state,
        gate=jax_gxpo.Gate(max_active_steps=2),
    )
    params: Any = {"w": jax.numpy.zeros(1)}
    state, points = gxpo.init(params), []

    def slope(theta: Any) -> Any:
        points.append(float(theta["w"][0]))
        return 0.0, {"w": jax.numpy.ones(1)}

    for _ in range(3):
        params, state, _ = gxpo.step(params, state, slope)
    points.append(float(params["w"][0]))
    np.testing.assert_allclose(-np.diff(points), [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 3], rtol=1e-5)


@pytest.mark.parametrize("broken_pass", [1, 2, 3])
def test_a_rolled_back_step_advances_a_schedule_once_and_a_skipped_one_not(broken_pass: int) -> None:
    """A non-finite gradient would shift the rest of the training's learning rates."""
    gxpo = jax_gxpo.GXPO(optax.sgd(lambda count: 1.0 / (count + 1)))
    params: Any = {"w": jax.numpy.zeros(1)}
    state, asked = gxpo.init(params), []

    def slope(theta: Any) -> Any:
        asked.append(theta)
        return 0.0, {"w": jax.numpy.full(1, np.nan if len(asked) == broken_pass else 1.0)}

    params, state, report = gxpo.step(params, state, slope)
    assert (report.outcome, report.passes) == ("skipped" if broken_pass == 1 else "rolled back", broken_pass)
    asked.extend([None] * 3)  # from here on every gradient is finite
    first = len(asked)
    gxpo.step(params, state, slope)
    rate = float(asked[first]["w"][0] - asked[first + 1]["w"][0])
    assert rate == pytest.approx(1.0 if broken_pass == 1 else 1 / 2)


def test_the_gate_closes_on_what_is_supplied_and_asks_for_it() -> None:
    """A trainer that forgets to hand in its entropy would train without a gate, and not be told."""
    gxpo = jax_gxpo.GXPO(optax.sgd(0.1), gate=jax_gxpo.Gate(statistic="supplied", window=2, patience=1))
    params: Any = {"w": jax.numpy.ones(1), "none": jax.numpy.zeros(0)}  # an empty tensor takes part and does no harm
    state, passes = gxpo.init(params), []
    for entropy in (1.0, 1.1, 5.0, 1.0):
        params, state, report = gxpo.step(params, state, lambda theta: (0.0, theta), entropy)
        passes.append(report.passes)
        assert report.mean_q is None or np.isfinite(report.mean_q)
    assert passes == [3, 3, 3, 1]
    for forgotten in (None, float("nan")):
        with pytest.raises(ValueError, match="supplied: the step needs a finite number"):
            gxpo.step(params, state, lambda theta: (0.0, theta), forgotten)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 1}, "horizon must be an int >= 2, got 1"),
        ({"horizon": 5.5}, "horizon must be an int >= 2, got 5.5"),
        ({"alpha": -1.0}, "alpha must be a number >= 0, got -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be None or a number > 0, got 0.0"),
        ({"estimator": "hessian"}, 'estimator must be "gradient", "displacement" or "tensor", got \'hessian\''),
        ({"optimizer_state": "drop"}, 'optimizer_state must be "keep" or "restore", got \'drop\''),
    ],
)
def test_a_bad_argument_is_named(settings: dict[str, Any], message: str) -> None:
    """A misspelt option would quietly train something else."""
    with pytest.raises(ValueError, match=message):
        jax_gxpo.GXPO(optax.sgd(0.1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistic": "norm"}, "no such statistic: 'norm'"),
        ({"baseline": "emma"}, 'baseline must be "window" or "ema", got \'emma\''),
        ({"patience": 0}, "window and patience must be >= 1, got 30 and 0"),
        ({"window": 0}, "window and patience must be >= 1, got 0 and 3"),
    ],
)
def test_a_bad_gate_is_named(settings: dict[str, Any], message: str) -> None:
    """An unknown baseline would score by the window, and a patience of 0 would switch GXPO off at the first step."""
    with pytest.raises(ValueError, match=message):
        jax_gxpo.Gate(**settings)
