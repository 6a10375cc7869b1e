"""Points, gradients by finite differences and comparisons, for the tests of the toy problems."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from gxpo_toy_tasks.tasks.bandits import Params

drawn = settings(max_examples=60, deadline=None, database=None)
seeds = st.integers(0, 10_000)


def finite_differences(function: Callable[[Params], float], params: Params, h: float = 1e-5) -> Params:
    """Central differences, coordinate by coordinate."""
    slopes = {name: np.zeros_like(value) for name, value in params.items()}
    for name, value in params.items():
        for at in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = {other: array.copy() for other, array in params.items()}
                moved[name][at] += sign * h
                ends.append(function(moved))
            slopes[name][at] = (ends[0] - ends[1]) / (2 * h)
    return slopes


def shifted(params: Params, scale: float, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {name: value + scale * rng.standard_normal(value.shape) for name, value in params.items()}


def assert_params_close(got: Params, wanted: Params, tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name)
