"""The port in JAX and optax: judged by the suite, and used as its docstring says."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from gxpo_conformance.bench import Bench
from gxpo_conformance.load import load
from gxpo_conformance.protocol import check_capabilities
from gxpo_conformance.run import run
from gxpo_conformance.search import search

jax = pytest.importorskip("jax", reason='the JAX port needs jax: pip install -e ".[jax]"')
optax = pytest.importorskip("optax", reason='the JAX port needs optax: pip install -e ".[jax]"')


jax_gxpo = pytest.importorskip("gxpo_reference.ports.jax_gxpo")
PORT = "gxpo_reference.ports.jax_port:Port"


def test_it_is_conformant() -> None:
    verdict = run(load(PORT))
    assert verdict.failed == []
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.dtypes == ["float64", "float32", "bfloat16"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_cases_do_not_reject_it(dtype: str) -> None:
    port = load(PORT)
    bench = Bench(port, check_capabilities(port.capabilities()), dtype, "cpu")
    assert [seed for seed in range(2) if search(bench, seed, 15)] == []


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
    """Nobody's parameters are a flat dict."""
    params, batch = problem()
    gxpo = jax_gxpo.GXPO(
        optax.adamw(1e-2), horizon=5, alpha=0.5, max_grad_norm=1.0, gate=jax_gxpo.Gate(max_active_steps=20)
    )
    state, passes, losses = gxpo.init(params), [], []
    value_and_grad = jax.jit(partial(jax.value_and_grad(loss_fn), batch=batch))
    for _ in range(25):
        params, state, report = gxpo.step(params, state, value_and_grad)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 1}, "horizon must be an int >= 2, got 1"),
        ({"estimator": "hessian"}, 'estimator must be "gradient", "displacement" or "tensor", got \'hessian\''),
        ({"optimizer_state": "drop"}, 'optimizer_state must be "keep" or "restore", got \'drop\''),
    ],
)
def test_a_bad_argument_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax_gxpo.GXPO(optax.sgd(0.1), **settings)
