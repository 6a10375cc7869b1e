"""The oracle's scale q and ratio r against exact fractions: an error here is one in every port's verdict."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import close, drawn

from gxpo_reference.oracle import extrapolation_scale, geometric_sum, retention_ratio

# ---- The scale -------------------------------------------------------------------------------------------------------


def exact_sum(r: Fraction, n: int) -> Fraction:
    return Fraction(n) if r == 1 else (1 - r**n) / (1 - r)


@drawn
@given(st.floats(-3, 3), st.integers(0, 14))
def test_geometric_sum_is_the_sum_of_powers(r: float, n: int) -> None:
    """Otherwise every q derives from a wrong S_n."""
    terms = [Fraction(r) ** i for i in range(n)]
    close(geometric_sum(r, n), float(sum(terms)), atol=1e-14 * float(sum(map(abs, terms))))


near_the_pole = st.floats(-8.5, -4).map(lambda e: 10**e).flatmap(lambda d: st.sampled_from([-1 + d, -1 - d]))


@settings(drawn, max_examples=300)
@given(st.one_of(st.floats(-2, 3), near_the_pole, st.floats(0.999, 1.001)), st.integers(2, 25))
def test_scale_equals_the_exact_quotient_of_sums(r: float, horizon: int) -> None:
    """Otherwise the virtual point is not K steps away: cancellation near r = 1 or r = -1, or a wrong clamp."""
    exact = Fraction(r)
    if horizon % 2 and abs(1 + exact) <= Fraction(1e-8):
        want = 1.0
    elif exact == -1:
        want = horizon / 2
    else:
        want = float(min(max(exact_sum(exact, horizon) / (1 + exact), 1), Fraction(horizon, 2) + 1))
    close(extrapolation_scale(r, horizon), want, rtol=1e-13)


@pytest.mark.parametrize("horizon", [2, 3, 4, 5, 10, 11, 1000, 1001])
def test_scale_at_the_points_with_a_known_answer(horizon: int) -> None:
    """A constant gradient (r = 1) goes K/2 times as far as two steps; r = 0 no further; r = -1 is K/2 or a pole."""
    odd = horizon % 2 == 1
    assert extrapolation_scale(1.0, horizon) == horizon / 2
    assert extrapolation_scale(0.0, horizon) == 1.0
    assert extrapolation_scale(-1.0, horizon) == (1.0 if odd else horizon / 2)
    cap = 1.0 if horizon == 2 else horizon / 2 + 1
    assert extrapolation_scale(3.0, horizon) == cap
    assert extrapolation_scale(-2.0, horizon) == (1.0 if odd else cap)


def test_scale_around_the_pole_of_an_odd_horizon() -> None:
    """The neutral zone is |1 + r| <= 1e-8: inside it q = 1, right of it the cap, left of it the floor."""
    r = np.array([-1 + 0.9e-8, -1 - 0.9e-8, -1 + 1.1e-8, -1 - 1.1e-8])
    assert extrapolation_scale(r, 5).tolist() == [1.0, 1.0, 3.5, 1.0]
    close(extrapolation_scale(r, 6), 3.0, rtol=1e-6)  # an even horizon has no pole


@drawn
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5), st.integers(2, 2001))
def test_scale_is_finite_and_bounded_for_any_ratio_and_horizon(r: list[float], horizon: int) -> None:
    """A NaN in q would put a NaN into the parameters."""
    q = extrapolation_scale(np.array(r), horizon)
    assert q.shape == (len(r),)
    assert np.all((q >= 1) & (q <= horizon / 2 + 1))


@pytest.mark.parametrize("r", [-2.0, -1.01, -0.99, 0.999, 1.001, 3.0])
def test_scale_at_a_huge_horizon_equals_the_exact_quotient(r: float) -> None:
    """inf - inf inside the sum must not decide where the clamp has the answer."""
    exact = exact_sum(Fraction(r), 1001) / (1 + Fraction(r))
    close(extrapolation_scale(r, 1001), float(min(max(exact, 1), Fraction(1003, 2))), rtol=1e-12)


@pytest.mark.parametrize("horizon", [1, 0, -3, 2.5, True, None])
def test_scale_refuses_a_horizon_below_two(horizon: Any) -> None:
    with pytest.raises(ValueError, match=f"horizon must be an int >= 2, got {horizon}"):
        extrapolation_scale(0.5, horizon)


# ---- The ratio -------------------------------------------------------------------------------------------------------


def test_ratio_is_clamped_and_leaves_out_what_is_inactive_or_not_finite() -> None:
    """Otherwise noise over noise, or an overflow, is extrapolated."""
    before = np.array([1.0, -2.0, 1.0, 1.0, 0.0, 1e-4, 1e-2])
    after = np.array([0.5, 1.0, 9.0, -9.0, 1.0, 1e-4, 1e-2])
    r, takes_part = retention_ratio(before, after)  # RMS 1.0 (7 / 7)
    assert takes_part.tolist() == [True, True, True, True, False, False, True]
    assert r.tolist() == [0.5, -0.5, 3.0, -2.0, 0.0, 0.0, 1.0]
    r, takes_part = retention_ratio(np.array([1e-10, 2e-10]), np.array([1e300, 2e-10]))
    assert (takes_part.tolist(), r.tolist()) == ([False, True], [0.0, 1.0])


@pytest.mark.parametrize(("factor", "active"), [(0.99e-3, False), (1.01e-3, True)])
def test_activity_is_a_thousandth_of_the_root_mean_square_of_the_whole_tensor(factor: float, active: bool) -> None:
    """Not of the maximum, the norm or the mean: they differ by more than the 1 % tested here."""
    before = np.array([[6.0, 0.0], [0.0, 0.0]])  # RMS 3 (maximum 6, mean 1.5)
    before[1, 1] = 3.0 * factor
    assert retention_ratio(before, before)[1].tolist() == [[True, False], [False, active]]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3,)])
def test_ratio_of_a_zero_gradient_is_neutral_in_every_shape(shape: tuple[int, ...]) -> None:
    r, takes_part = retention_ratio(np.zeros(shape), np.ones(shape))
    assert r.shape == takes_part.shape == shape
    assert not r.any()
    assert not takes_part.any()


def test_ratio_sees_gradients_whose_squares_underflow() -> None:
    """A tensor at 1e-200 has an RMS of 1e-200, not 0: its small coordinates are as inactive as anywhere."""
    _, takes_part = retention_ratio(np.array([1e-200, 1e-204]), np.array([1e-200, 1e-200]))
    assert takes_part.tolist() == [True, False]
