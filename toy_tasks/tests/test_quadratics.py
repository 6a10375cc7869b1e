"""The quadratic toy problems against finite differences, eigenvalues and closed forms.

Ports are judged on these problems: an error here fails a right port, or passes a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_gradients import assert_params_close, drawn, finite_differences, seeds, shifted

from gxpo_toy_tasks.tasks.quadratics import Quadratic, plain_steps

quadratics = pytest.mark.parametrize("build", [Quadratic.diagonal, Quadratic.rotated])


@quadratics
@drawn
@given(dim=st.integers(2, 12), condition=st.floats(1, 1e4), seed=seeds)
def test_quadratic_has_the_eigenvalues_asked_for(
    build: Callable[..., Quadratic], dim: int, condition: float, seed: int
) -> None:
    """Otherwise "stable for lr < 2" and "condition 1e4" describe some other problem."""
    quadratic = build(dim, condition, seed)
    eigenvalues = np.linalg.eigvalsh(quadratic.matrix)
    np.testing.assert_allclose(eigenvalues[::-1], np.geomspace(1, 1 / condition, dim), rtol=1e-9)
    assert quadratic.matrix.shape == (dim, dim)


def test_diagonal_is_diagonal_and_rotated_is_not() -> None:
    """Otherwise the identity on diagonal quadratics is tested where it does not hold, or rotation is never tested."""
    for quadratic in (Quadratic.diagonal(), Quadratic.ill_conditioned()):
        assert np.array_equal(quadratic.matrix, np.diag(np.diag(quadratic.matrix)))
    for quadratic in (Quadratic.rotated(), Quadratic.ill_conditioned(rotated=True)):
        assert np.count_nonzero(np.abs(quadratic.matrix) > 1e-6) == quadratic.matrix.size


def test_ill_conditioned_reaches_the_activity_rule() -> None:
    """Otherwise no toy run has an inactive coordinate (|g0| <= 1e-3 RMS), and the rule goes untested end to end."""
    quadratic = Quadratic.ill_conditioned()
    slope = np.abs(quadratic.gradient(quadratic.initial())[1]["x"])
    active = slope > 1e-3 * np.sqrt(np.mean(slope**2))
    assert active.any()
    assert not active.all()
    assert np.linalg.cond(quadratic.matrix) == pytest.approx(1e4)


@quadratics
@drawn
@given(dim=st.integers(2, 8), condition=st.floats(1, 1e4), seed=seeds)
def test_quadratic_gradient_is_that_of_its_loss(
    build: Callable[..., Quadratic], dim: int, condition: float, seed: int
) -> None:
    """Otherwise a port follows a gradient that belongs to no loss."""
    quadratic = build(dim, condition, seed)
    params = shifted(quadratic.initial(), 1.0, seed)
    loss, grads = quadratic.gradient(params)
    assert loss == quadratic.loss(params)
    assert loss > 0
    assert_params_close(grads, finite_differences(quadratic.loss, params), 1e-8)
    loss, grads = quadratic.gradient({"x": quadratic.minimum})
    assert loss == 0
    assert not grads["x"].any()


@quadratics
@drawn
@given(dim=st.integers(2, 8), condition=st.floats(1, 1e4), seed=seeds, lr=st.floats(0, 1.9), k=st.integers(0, 12))
def test_plain_steps_equal_the_loop(
    build: Callable[..., Quadratic], dim: int, condition: float, seed: int, lr: float, k: int
) -> None:
    """Otherwise "equals K + 1 plain steps" is tested against the wrong point."""
    quadratic = build(dim, condition, seed)
    x = quadratic.start
    for _ in range(k):
        x = x - lr * quadratic.gradient({"x": x})[1]["x"]
    np.testing.assert_allclose(plain_steps(quadratic, quadratic.start, lr, k), x, rtol=0, atol=1e-12)


@quadratics
def test_quadratics_are_fixed_by_their_seed(build: Callable[..., Quadratic]) -> None:
    """Otherwise a failure cannot be run again, or every seed tests the same problem."""
    one, same, other = build(seed=3), build(seed=3), build(seed=4)
    for field in ("matrix", "minimum", "start"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
    assert not np.array_equal(one.start, other.start)
    assert one.name == same.name != other.name


@quadratics
@drawn
@given(seed=seeds)
def test_no_coordinate_starts_at_its_minimum(build: Callable[..., Quadratic], seed: int) -> None:
    """Otherwise a coordinate shows nothing, and a case proves nothing there."""
    quadratic = build(seed=seed)
    assert np.abs(quadratic.start - quadratic.minimum).min() > 0.49


def test_a_port_that_works_in_place_cannot_change_the_problem() -> None:
    """Otherwise the second run from the same problem starts elsewhere."""
    quadratic = Quadratic.diagonal()
    params = quadratic.initial()
    params["x"] += 1.0
    assert not np.array_equal(params["x"], quadratic.start)
    with pytest.raises(ValueError, match="read-only"):
        quadratic.start += 1.0
    given_start = np.zeros(2)
    made = Quadratic("by hand", np.eye(2), np.ones(2), given_start)
    given_start += 1.0
    assert not made.start.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratic.diagonal(dim=1), "dim must be at least 2.*got 1"),
        (lambda: Quadratic.rotated(condition=0.5), "condition must be finite and at least 1, got 0.5"),
        (lambda: Quadratic.diagonal(condition=np.nan), "condition must be .*got nan"),
        (lambda: Quadratic.rotated(condition=np.inf), "condition must be .*got inf"),
        (lambda: Quadratic.diagonal(seed=-1), "seed must be at least 0, got -1"),
        (lambda: Quadratic("q", np.eye(3), np.ones(2), np.ones(2)), r"matrix must have shape \(2, 2\), got \(3, 3\)"),
        (lambda: Quadratic("q", np.eye(2), np.ones(2), np.ones(3)), r"start must have shape \(2,\), got \(3,\)"),
        (lambda: Quadratic("q", np.eye(2), np.ones((2, 1)), np.ones(2)), r"minimum must have .*got \(2, 1\)"),
        (lambda: Quadratic("q", np.triu(np.ones((2, 2))), np.ones(2), np.ones(2)), "matrix must be symmetric"),
        (lambda: Quadratic.diagonal().gradient({"y": np.ones(8)}), r"params must be {'x': \(8,\)}, got {'y'"),
        (lambda: Quadratic.diagonal().loss({"x": np.ones(7)}), r"params must be .*got {'x': \(7,\)}"),
        (lambda: plain_steps(Quadratic.diagonal(), np.ones(8), 0.1, -1), "k must be at least 0, got -1"),
        (lambda: plain_steps(Quadratic.diagonal(), np.ones(1), 0.1, 1), r"x must have shape \(8,\), got \(1,\)"),
    ],
)
def test_quadratics_name_a_bad_argument(make: Callable[[], Any], message: str) -> None:
    """Otherwise a mistake in a case broadcasts into another problem."""
    with pytest.raises(ValueError, match=message):
        make()
