"""The numpy oracle against torch.optim, exact fractions, closed forms and numbers worked out by hand.

The oracle says what is right for every port, so nothing here leans on another implementation of GXPO.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gxpo_reference.oracle import Arrays, Oracle, Trace, extrapolation_scale, geometric_sum, retention_ratio

drawn = settings(max_examples=60, deadline=None, database=None)

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
ADAMW = {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
GATE = {
    "statistic": "supplied",
    "baseline": "window",
    "window": 4,
    "threshold": 3.0,
    "patience": 1,
    "two_sided": False,
    "warmup": 0,
    "cooldown": None,
    "max_active_steps": None,
}
EMA = {"baseline": "ema", "omega": 0.5}


def config(**changes: Any) -> dict:
    base = {
        "horizon": 5,
        "alpha": 0.5,
        "estimator": "gradient",
        "optimizer_state": "restore",
        "max_grad_norm": None,
        "gate": None,
        "optimizer": SGD,
    }
    assert changes.keys() <= base.keys()
    return copy.deepcopy(base | changes)


def arrays(**values: Any) -> Arrays:
    return {name: np.array(value, dtype=np.float64) for name, value in values.items()}


def scripted(*grads: Arrays, losses: Sequence[float] = ()) -> Callable[[Arrays], tuple[float, Arrays]]:
    """Pass i returns grads[i], whatever point was asked."""
    turns = iter([(losses[i] if losses else 0.0, g) for i, g in enumerate(grads)])
    return lambda point: next(turns)


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality through dicts, lists, arrays and dataclasses."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and a.tobytes() == b.tobytes()
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b


def close(got: Any, want: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


# ---- The scale ------------------------------------------------------------------------------------------------------


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


# ---- The ratio ------------------------------------------------------------------------------------------------------


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


# ---- The optimizers -------------------------------------------------------------------------------------------------

unit = st.floats(-2, 2)
three_values = st.lists(unit, min_size=3, max_size=3)
sgd_settings = st.fixed_dictionaries(
    {"lr": st.floats(0, 1), "momentum": st.sampled_from([0.0, 0.5, 0.9, 1.0]), "weight_decay": st.floats(0, 0.5)}
)
adamw_settings = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.5),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.floats(1e-10, 1e-2),
        "weight_decay": st.floats(0, 0.5),
    }
)


def torch_optimizer(tensors: dict[str, torch.Tensor], optimizer: dict) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer["name"]]
    return kind(list(tensors.values()), **{key: value for key, value in optimizer.items() if key != "name"})


def follow_torch(optimizer: dict, start: list[float], grads: list[list[float]], max_norm: float | None) -> None:
    values = {"matrix": [[start[0]], [start[1]]], "scalar": start[2], "empty": []}
    oracle = Oracle(
        arrays(**values),
        config(gate=GATE | {"max_active_steps": 0}, optimizer=optimizer, max_grad_norm=max_norm),
    )
    tensors = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}
    base = torch_optimizer(tensors, optimizer)
    for g in grads:
        received = arrays(matrix=[[g[0]], [g[1]]], scalar=g[2], empty=[])
        assert oracle.step(scripted(received)).outcome == "single"
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(received[name])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
        base.step()
        for name, tensor in tensors.items():
            close(oracle.params[name], tensor.detach().numpy(), rtol=1e-11, atol=1e-12)


scripts = st.lists(three_values, min_size=5, max_size=7)
max_norms = st.sampled_from([None, 0.5, 100.0])


@drawn
@given(sgd_settings, three_values, scripts, max_norms)
def test_sgd_is_torch_sgd(options: dict, start: list[float], grads: list[list[float]], max_norm: float | None) -> None:
    """Otherwise a port on torch.optim.SGD is told that its single-pass step is wrong."""
    follow_torch({"name": "sgd"} | options, start, grads, max_norm)


@drawn
@given(adamw_settings, three_values, scripts, max_norms)
def test_adamw_is_torch_adamw(
    options: dict, start: list[float], grads: list[list[float]], max_norm: float | None
) -> None:
    """Otherwise a port on torch.optim.AdamW is told that its single-pass step is wrong."""
    follow_torch({"name": "adamw"} | options, start, grads, max_norm)


# ---- The active step ------------------------------------------------------------------------------------------------


def test_active_step_worked_out_by_hand() -> None:
    """Every point of one step, K = 3, alpha = 1/2, lr = 0.1: r = (1/2, -1/2), q = (7/6, 3/2)."""
    oracle = Oracle(arrays(w=[1.0, 2.0]), config(horizon=3))
    trace = oracle.step(scripted(arrays(w=[1, 1]), arrays(w=[0.5, -0.5]), arrays(w=[2, 4]), losses=[3, 2, 1]))
    assert (trace.step, trace.outcome, trace.why, trace.passes) == (0, "active", "", 3)
    want = {
        "theta0": [1.0, 2.0],
        "theta1": [0.9, 1.9],
        "theta2": [0.85, 1.95],
        "thetaK": [1 - 0.15 * 7 / 6, 2 - 0.05 * 3 / 2],
        "theta~": [1 - 0.15 * 7 / 12, 2 - 0.05 * 3 / 4],
        "theta'": [1 - 0.15 * 7 / 12 - 0.2, 2 - 0.05 * 3 / 4 - 0.4],
    }
    assert trace.points.keys() == want.keys()
    for name, value in want.items():
        close(trace.points[name]["w"], value)
    close(trace.r["w"], [0.5, -0.5])
    close(trace.q["w"], [7 / 6, 3 / 2])
    assert trace.takes_part["w"].all()
    assert same(trace.asked, [trace.points[name] for name in ("theta0", "theta1", "theta~")])
    assert same(trace.grads, [arrays(w=[1, 1]), arrays(w=[0.5, -0.5]), arrays(w=[2, 4])])
    assert (trace.losses, trace.clips) == ([3.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    close(trace.norms, [math.sqrt(2), math.sqrt(0.5), math.sqrt(20)])
    assert same(oracle.params, trace.points["theta'"])
    assert trace.states == {"s0": {}, "s1": {}, "s2": {}, "s'": {}}


def test_clipping_is_by_the_norm_of_all_tensors_and_the_ratio_uses_what_the_optimizer_was_given() -> None:
    """Norms 5 and 0.5 under C = 1: the raw ratio is 0.1, the one that the optimizer saw is 0.1 (5 + 1e-6)."""
    oracle = Oracle(arrays(a=1.0, b=[2.0]), config(max_grad_norm=1.0))
    trace = oracle.step(scripted(arrays(a=3, b=[4]), arrays(a=0.3, b=[0.4]), arrays(a=30, b=[40])))
    close(trace.norms, [5.0, 0.5, 50.0])
    close(trace.clips, [1 / (5 + 1e-6), 1.0, 1 / (50 + 1e-6)], atol=0)
    close(trace.r["a"], 0.1 * (5 + 1e-6))
    close(trace.points["theta1"]["a"], 1 - 0.1 * 3 / (5 + 1e-6))
    close(trace.points["theta~"]["b"] - trace.points["theta'"]["b"], [0.1 * 40 / (50 + 1e-6)])
    assert same(trace.grads[0], arrays(a=3, b=[4]))


def test_activity_is_judged_within_each_tensor() -> None:
    """The same small gradient is noise beside large ones and a signal in a tensor of its own."""
    oracle = Oracle(arrays(mixed=[0.0, 0.0], own=[0.0]), config(horizon=4, alpha=1.0))
    g = arrays(mixed=[1.0, 1e-4], own=[1e-4])
    trace = oracle.step(scripted(g, g, g))
    assert trace.takes_part["mixed"].tolist() == [True, False]
    assert (trace.r["mixed"].tolist(), trace.q["mixed"].tolist()) == ([1.0, 0.0], [2.0, 1.0])
    assert trace.q["own"].tolist() == [2.0]
    close(trace.points["theta~"]["mixed"], [-0.4, -2e-5])


ratios = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4)


@pytest.mark.parametrize("estimator", ["gradient", "displacement"])
@drawn
@given(keep=ratios, horizon=st.integers(2, 12))
def test_alpha_one_on_a_diagonal_quadratic_equals_k_plus_one_plain_steps(
    estimator: str, keep: list[float], horizon: int
) -> None:
    """The identity that the method is built on; each coordinate keeps its own share of gradient per step."""
    curvature, lr = (1 - np.array(keep)) / 0.1, 0.1
    start = np.divide(1.0, curvature, out=np.ones_like(curvature), where=curvature > 0)  # gradients alike: all active
    oracle = Oracle({"w": start}, config(horizon=horizon, alpha=1.0, estimator=estimator))
    w = oracle.params["w"].copy()
    for _ in range(horizon + 1):
        w -= lr * curvature * w
    oracle.step(lambda p: (0.0, {"w": curvature * p["w"]}))
    close(oracle.params["w"], w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ["gradient", "displacement", "tensor"])
@pytest.mark.parametrize("horizon", [2, 3, 4, 5, 10, 11])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
def test_linear_loss_lands_exactly_k_steps_away(estimator: str, horizon: int, alpha: float) -> None:
    """A constant gradient is where a rounded-off or regularised quotient shows: q must be K/2, not 1 or the cap."""
    oracle = Oracle(arrays(w=[1.0, -1.0], b=0.5), config(horizon=horizon, alpha=alpha, estimator=estimator))
    g = arrays(w=[0.5, -2.0], b=1e-5)
    trace = oracle.step(lambda p: (0.0, g))
    for name in g:
        theta0 = trace.points["theta0"][name]
        close(trace.points["thetaK"][name], theta0 - horizon * 0.1 * g[name])
        close(trace.points["theta'"][name], theta0 - (alpha * horizon + 1) * 0.1 * g[name])


@drawn
@given(
    st.lists(three_values, min_size=3, max_size=3),
    st.sampled_from([SGD, SGD | {"momentum": 0.9}, ADAMW]),
    st.sampled_from(["gradient", "displacement", "tensor"]),
    st.sampled_from(["keep", "restore"]),
)
def test_horizon_two_is_two_step_lookahead_whatever_the_ratio(
    grads: list[list[float]], optimizer: dict, estimator: str, policy: str
) -> None:
    """GXPO at K = 2 must equal SFPO with two fast steps."""
    if not any(grads[0]):
        grads[0] = [1.0, 1.0, 1.0]
    oracle = Oracle(
        arrays(w=[1.0, 2.0, 3.0]), config(horizon=2, estimator=estimator, optimizer=optimizer, optimizer_state=policy)
    )
    trace = oracle.step(scripted(*(arrays(w=g) for g in grads)))
    assert same(trace.q, arrays(w=[1, 1, 1]))
    theta0, theta2 = trace.points["theta0"]["w"], trace.points["theta2"]["w"]
    close(trace.points["thetaK"]["w"], theta2)
    close(trace.points["theta~"]["w"], (theta0 + theta2) / 2)


@pytest.mark.parametrize("policy", ["keep", "restore"])
@pytest.mark.parametrize("estimator", ["gradient", "displacement", "tensor"])
@pytest.mark.parametrize("optimizer", [SGD | {"momentum": 0.9, "weight_decay": 0.1}, ADAMW | {"lr": 0.1}])
def test_active_steps_follow_torch_optimizers_moved_by_hand(policy: str, estimator: str, optimizer: dict) -> None:
    """The whole step over a real optimizer and its state_dict: the points, r and q, and which state goes on."""
    rng = np.random.default_rng(5)
    start, horizon, alpha = rng.normal(size=6), 6, 0.4
    oracle = Oracle(
        {"w": start},
        config(horizon=horizon, alpha=alpha, estimator=estimator, optimizer=optimizer, optimizer_state=policy),
    )
    w = torch.tensor(start, requires_grad=True)
    base = torch_optimizer({"w": w}, optimizer)

    def move(g: np.ndarray) -> np.ndarray:
        w.grad = torch.tensor(g)
        base.step()
        return w.detach().numpy().copy()

    for _ in range(3):
        g0, g1, g2 = rng.uniform(0.5, 2, size=(3, 6)) * rng.choice([-1, 1], size=(3, 6))
        trace = oracle.step(scripted({"w": g0}, {"w": g1}, {"w": g2}))
        theta0, s0 = w.detach().numpy().copy(), copy.deepcopy(base.state_dict())
        theta1, theta2 = move(g0), move(g1)
        u0, u1 = theta1 - theta0, theta2 - theta1
        r = {"gradient": g1 / g0, "displacement": u1 / u0, "tensor": np.full(6, (u0 @ u1) / (u0 @ u0))}[estimator]
        r = np.where(np.abs(u0 if estimator == "displacement" else g0) > 0, np.clip(r, -2, 3), 0)
        q = np.clip(np.polyval([1.0] * horizon, r) / (1 + r), 1, horizon / 2 + 1)
        theta_ = theta0 + alpha * q * (theta2 - theta0)
        with torch.no_grad():
            w.copy_(torch.tensor(theta_))
        if policy == "restore":
            base.load_state_dict(s0)
        end = move(g2)
        for name, want in [("theta1", theta1), ("theta2", theta2), ("theta~", theta_), ("theta'", end)]:
            close(trace.points[name]["w"], want, rtol=1e-9)
        close(trace.r["w"], r, rtol=1e-9)
        close(trace.q["w"], q, rtol=1e-9)
        state = base.state[w]
        if optimizer["name"] == "sgd":
            close(trace.states["s'"]["momentum_buffer"]["w"], state["momentum_buffer"].numpy())
        else:
            close(trace.states["s'"]["exp_avg_sq"]["w"], state["exp_avg_sq"].numpy())


def test_kept_state_advances_three_times_a_step_and_restored_state_once() -> None:
    """Otherwise AdamW's bias correction runs at another speed than the policy promises."""
    for policy, per_step in (("keep", 3), ("restore", 1)):
        oracle = Oracle(arrays(w=[1.0, 2.0]), config(optimizer=ADAMW, optimizer_state=policy))
        for n in range(3):
            trace = oracle.step(lambda p: (0.0, p))
            assert trace.states["s0"].get("step", 0) == n * per_step
            assert [trace.states[s]["step"] for s in ("s1", "s2")] == [n * per_step + 1, n * per_step + 2]
            assert trace.states["s'"]["step"] == (n + 1) * per_step


def test_displacement_ratio_of_settled_adamw_is_the_step_ratio_not_the_gradient_ratio() -> None:
    """AdamW's step is not proportional to the gradient: g1 = 4 g0 gives 3 (clamped) by one, 1.29 by the other."""
    settled = {"step": 100_000, "exp_avg": arrays(w=[1.0]), "exp_avg_sq": arrays(w=[1.0])}
    found = {}
    for estimator in ("gradient", "displacement", "tensor"):
        oracle = Oracle(arrays(w=[0.0]), config(estimator=estimator, optimizer=ADAMW | {"weight_decay": 0.0}))
        oracle.load(oracle.save() | {"optimizer": settled})
        found[estimator] = float(oracle.step(scripted(*(arrays(w=[g]) for g in (1, 4, 1)))).r["w"][0])
    # u0 = -lr; then m = 0.9 + 0.1 * 4 and v = 0.999 + 0.001 * 16
    want = pytest.approx(1.3 / math.sqrt(1.015), rel=1e-6)
    assert found == {"gradient": 3.0, "displacement": want, "tensor": want}


def test_tensor_estimator_uses_one_ratio_and_is_neutral_where_nothing_moved() -> None:
    """r = <u0, u1> / <u0, u0> = (1 * 1 + 2 * 0.25) / 5 = 0.3 under SGD, no activity rule; u0 = 0 gives q = 1."""
    oracle = Oracle(
        arrays(w=[0.0, 0.0, 0.0], still=[1.0, 1.0], none=[], s=2.0, high=[0.0], low=[0.0]),
        config(estimator="tensor", horizon=4),
    )
    trace = oracle.step(
        scripted(
            arrays(w=[1, 2, 0], still=[0, 0], none=[], s=1e-170, high=[1], low=[1]),
            arrays(w=[1, 0.25, 7], still=[1, 1], none=[], s=5e-171, high=[9], low=[-9]),
            arrays(w=[0, 0, 0], still=[0, 0], none=[], s=0, high=[0], low=[0]),
        )
    )
    close(trace.r["w"], [0.3] * 3)
    close(trace.q["w"], [1.09] * 3)  # K = 4: 1 + r^2
    assert trace.takes_part["w"].tolist() == [True] * 3
    assert trace.takes_part["still"].tolist() == [False] * 2
    assert trace.q["still"].tolist() == [1.0, 1.0]
    close(trace.points["theta~"]["still"], [0.95, 0.95])  # half of one observed step of 0.1
    assert trace.r["none"].shape == (0,)
    assert trace.r["high"].tolist() == [3.0]
    assert trace.r["low"].tolist() == [-2.0]
    assert not trace.takes_part["s"]  # 1e-171 vanishes beside 2.0: nothing moved


def test_ratios_keep_their_value_when_squares_underflow() -> None:
    """An inner product of 1e-170 with itself reads 0: the ratio must not turn neutral for that."""
    for estimator in ("gradient", "displacement", "tensor"):
        oracle = Oracle(arrays(w=[0.0, 0.0]), config(estimator=estimator))
        trace = oracle.step(scripted(*(arrays(w=[g, 2 * g]) for g in (1e-170, 5e-171, 1e-170))))
        assert trace.outcome == "active"
        close(trace.r["w"], [0.5, 0.5])
        close(trace.norms[0], math.sqrt(5) * 1e-170, atol=0)


def test_overflowing_ratio_is_neutral() -> None:
    """1e200 / 1e-200 is not finite: that coordinate is not extrapolated, and the step goes on."""
    oracle = Oracle(arrays(w=[0.0, 0.0]), config(optimizer=SGD | {"lr": 1e-210}))
    trace = oracle.step(scripted(arrays(w=[1e-200, 2e-200]), arrays(w=[1e200, 1e-200]), arrays(w=[1, 1])))
    assert trace.outcome == "active"
    assert trace.takes_part["w"].tolist() == [False, True]
    assert (trace.r["w"][0], trace.q["w"][0]) == (0.0, 1.0)


def test_zero_learning_rate_leaves_every_displacement_inactive() -> None:
    oracle = Oracle(arrays(w=[1.0, 2.0]), config(estimator="displacement", optimizer=SGD | {"lr": 0.0}))
    trace = oracle.step(lambda p: (0.0, p))
    assert not trace.takes_part["w"].any()
    assert same(oracle.params, arrays(w=[1, 2]))


@pytest.mark.parametrize("estimator", ["gradient", "displacement", "tensor"])
@pytest.mark.parametrize("optimizer", [SGD | {"momentum": 0.9}, ADAMW])
def test_scalars_and_empty_tensors_are_ordinary_tensors(estimator: str, optimizer: dict) -> None:
    """A 0-d parameter moves as the same number in a vector does, and stays an array in everything kept."""
    runs = []
    for x in (0.7, [0.7]):
        oracle = Oracle(arrays(x=x, none=np.zeros((0, 3))), config(estimator=estimator, optimizer=optimizer))
        traces = [oracle.step(lambda p: (0.0, {"x": p["x"] ** 2, "none": p["none"]})) for _ in range(3)]
        runs.append((oracle, traces))
    (scalar, traces), (vector, _) = runs
    assert scalar.params["x"].shape == ()
    assert scalar.params["x"] == vector.params["x"][0]
    kept = [*traces[-1].points.values(), *traces[-1].asked, *traces[-1].grads, traces[-1].r, traces[-1].q]
    assert all(type(a) is np.ndarray for d in [*kept, traces[-1].takes_part] for a in d.values())


# ---- The gate -------------------------------------------------------------------------------------------------------


def one(oracle: Oracle, h: float | None = None, g: float = 1.0) -> Trace:
    return oracle.step(lambda p: (0.0, arrays(w=[g, -g])), supplied=h)


def gated(**changes: Any) -> Oracle:
    return Oracle(arrays(w=[1.0, 2.0]), config(gate=GATE | changes))


def feed(oracle: Oracle, hs: Sequence[float | None]) -> list[Trace]:
    return [one(oracle, h) for h in hs]


def outcomes(traces: list[Trace]) -> str:
    return "".join({"active": "a", "single": "s", "rolled back": "r", "skipped": "k"}[t.outcome] for t in traces)


def test_window_scores_against_the_preceding_values_only() -> None:
    """A window that contains the value it scores cannot reach sqrt(w - 1) and goes blind; std is of the population."""
    traces = feed(gated(), [1, 2, 3, 4, 10])
    assert [t.z for t in traces[:4]] == [None] * 4
    assert [t.baseline for t in traces[:4]] == [None] * 4
    assert traces[4].baseline == (2.5, math.sqrt(1.25))
    close(traces[4].z, 7.5 / (math.sqrt(1.25) + 1e-9))
    assert [t.statistic for t in traces] == [1, 2, 3, 4, 10]
    assert [t.tripped for t in traces] == [False] * 4 + [True]


def test_window_slides() -> None:
    traces = feed(gated(threshold=100.0), [1, 2, 3, 4, 10, 5])
    close(traces[5].baseline, [4.75, np.std([2, 3, 4, 10])])


def test_unfilled_window_never_trips() -> None:
    """Nothing is known yet, however wild the value."""
    traces = feed(gated(window=5), [1, 1, 1, 1e9])
    assert outcomes(traces) == "aaaa"
    assert not any(t.tripped for t in traces)


def test_sigma_has_a_small_constant_and_no_more() -> None:
    """On a flat window z is the distance over 1e-9, not over a comfortable floor."""
    close(feed(gated(threshold=1e9), [2, 2, 2, 2, 2.5])[4].z, 0.5 / 1e-9)


def test_threshold_itself_trips_and_just_below_does_not() -> None:
    z = 4 / (1 + 1e-9)
    for threshold, tripped in ((z, True), (math.nextafter(z, 9), False)):
        assert feed(gated(threshold=threshold), [1, 3, 1, 3, 6])[4].tripped is tripped


def test_step_that_trips_stands_and_the_next_is_the_first_single_pass() -> None:
    """The tripping step is a whole active step; after it, one pass each, for good."""
    oracle = gated()
    traces = feed(oracle, [1, 3, 1, 3, 6, None, None, None])
    assert outcomes(traces) == "aaaaasss"
    assert (traces[4].passes, traces[5].passes) == (3, 1)
    assert traces[5].why == "gate closed at step 4"
    close(traces[4].points["theta'"]["w"], [1 - 5 * 0.35, 2 + 5 * 0.35])  # alpha K + 1 = 3.5 steps of 0.1 each
    close(oracle.params["w"], [1 - 5 * 0.35 - 0.3, 2 + 5 * 0.35 + 0.3])
    assert (traces[5].statistic, traces[5].z, traces[5].r) == (None, None, None)
    assert traces[5].points.keys() == {"theta0", "theta'"}


def test_patience_scores_the_whole_streak_against_the_baseline_of_its_first_member() -> None:
    """Window (1, 3, 1, 3): three sixes score 4, 4, 4. Unpinned, the second would score 1.5 and the gate stay open."""
    traces = feed(gated(patience=3), [1, 3, 1, 3, 6, 6, 6, None])
    assert [t.streak for t in traces] == [0, 0, 0, 0, 1, 2, 3, 0]
    close([t.z for t in traces[4:7]], [4 / (1 + 1e-9)] * 3)
    assert [t.baseline for t in traces[4:7]] == [(2.0, 1.0)] * 3
    assert [t.tripped for t in traces[4:7]] == [False, False, True]
    assert outcomes(traces) == "aaaaaaas"


def test_broken_streak_unpins_and_the_history_has_grown_underneath() -> None:
    """6, 6, then 2: not in a row, so no trip; the next value is scored by (3, 6, 6, 2)."""
    traces = feed(gated(patience=3), [1, 3, 1, 3, 6, 6, 2, 6, 6])
    assert [t.streak for t in traces] == [0, 0, 0, 0, 1, 2, 0, 0, 0]
    assert traces[6].baseline == (2.0, 1.0)  # the value that breaks it is still scored by the pinned one
    close(traces[7].baseline, [4.25, np.std([3, 6, 6, 2])])
    assert outcomes(traces) == "a" * 9


def test_low_values_are_a_sign_of_danger_only_when_two_sided() -> None:
    for two_sided in (False, True):
        trace = feed(gated(two_sided=two_sided), [1, 3, 1, 3, -2])[4]
        close(trace.z, -4 / (1 + 1e-9))
        assert trace.tripped is two_sided


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_cooldown_counts_single_passes_then_goes_on_with_its_baseline_and_no_streak(cooldown: int) -> None:
    """Trip at step 5; active again at 6 + n, scored at once by what was seen before, streak from 0, unpinned."""
    hs = [1, 3, 1, 3, 6, 6] + [None] * cooldown + [9, 6]
    traces = feed(gated(patience=2, cooldown=cooldown), hs)
    assert outcomes(traces) == "a" * 6 + "s" * cooldown + "aa"
    assert (traces[5].tripped, traces[5].streak) == (True, 2)
    back = traces[6 + cooldown]
    assert back.step == 6 + cooldown
    close(back.baseline, [4.0, np.std([1, 3, 6, 6])])
    assert (back.streak, back.tripped) == (0, False)  # z = 5 / 2.1 < 3


def test_gate_can_trip_again_after_a_cooldown() -> None:
    traces = feed(gated(cooldown=1), [1, 3, 1, 3, 6, None, 30, None, 6])
    assert outcomes(traces) == "aaaaasasa"
    assert traces[7].why == "gate closed at step 6"


@pytest.mark.parametrize("statistic", ["supplied", "never"])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_budget_is_for_good_even_with_a_cooldown(statistic: str, budget: int) -> None:
    """The hard limit on cost holds whatever the gate says."""
    oracle = gated(statistic=statistic, max_active_steps=budget, cooldown=1)
    traces = feed(oracle, [1.0] * 6)
    assert outcomes(traces) == "a" * budget + "s" * (6 - budget)
    assert traces[-1].why == f"budget of {budget} active steps spent"


def test_budget_counts_completed_active_steps_only() -> None:
    """Rolled-back, skipped and zero-gradient steps did not spend it."""
    oracle = gated(statistic="never", max_active_steps=2)
    nan, good, zero = arrays(w=[math.nan, 1]), arrays(w=[1, 1]), arrays(w=[0, 0])
    traces = [oracle.step(scripted(*g)) for g in ([good, nan], [nan], [zero], [good] * 3, [good] * 3, [good])]
    assert outcomes(traces) == "rksaas"


def test_warmup_steps_are_active_and_observe_nothing_that_lasts() -> None:
    """The wild first steps must neither fill the window nor be scored."""
    traces = feed(gated(warmup=3), [None, 1e9, -1e9, 1, 3, 1, 3, 6])
    assert outcomes(traces) == "a" * 8
    assert [t.statistic for t in traces[:4]] == [None, None, None, 1]
    assert [t.z is None for t in traces] == [True] * 7 + [False]
    assert traces[7].baseline == (2.0, 1.0)


def test_warmup_counts_outer_steps_of_any_outcome() -> None:
    oracle = gated(warmup=2)
    one(oracle, None, g=math.nan)
    one(oracle, None, g=0.0)
    assert one(oracle, 5.0).statistic == 5.0


def test_ema_by_hand_with_two_unscored_observations() -> None:
    """omega 1/2 from (1, 1): 3 -> (2, 2.5), 2 -> (2, 1.25), then 4 scores 2 / sqrt(1.25) and gives (3, 2.625)."""
    traces = feed(gated(**EMA), [3, 2, 4, 6, 6])
    assert [t.z for t in traces[:2]] == [None, None]
    close(traces[2].baseline, [2, math.sqrt(1.25)])
    close(traces[2].z, 2 / (math.sqrt(1.25) + 1e-9))
    close(traces[3].baseline, [3, math.sqrt(2.625)])  # sigma moves by the old mean: by the new one it is 1.27
    close(traces[4].baseline, [4.5, math.sqrt(2.625 / 2 + 9 / 2)])


def test_ema_weighs_the_new_value_by_omega() -> None:
    """omega 0.1 is a memory of ten steps; by 1 - omega it would be one of none."""
    traces = feed(gated(baseline="ema", omega=0.1), [3, 2, 2])
    # (1, 1) -> 3 -> (1.2, 0.9 + 0.4) -> 2 -> (1.28, 1.17 + 0.064)
    close(traces[2].baseline, [1.28, math.sqrt(1.234)])


def test_ema_cold_start_does_not_trip() -> None:
    """Against (1, 1) any real gradient norm would: the first two observations only teach."""
    assert not any(t.tripped for t in feed(gated(**EMA, threshold=0.5), [50.0, 50.0]))


def test_ema_sigma_has_a_floor_where_it_is_read() -> None:
    """On a flat series sigma reads 0.01; the variance underneath goes on shrinking and comes back without a debt."""
    traces = feed(gated(**EMA, threshold=100.0), [1.0] * 20 + [1.5, 1.5])
    close(traces[20].baseline, [1.0, 0.01])
    close(traces[20].z, 0.5 / (0.01 + 1e-9))
    close(traces[21].baseline, [1.25, math.sqrt(2.0**-21 + 0.125)])


def test_ema_streak_is_pinned_too() -> None:
    traces = feed(gated(**EMA, patience=3, threshold=2.0), [1, 1, 9, 9, 1, 1])
    assert [t.streak for t in traces] == [0, 0, 1, 2, 0, 0]
    assert [t.baseline for t in traces[2:5]] == [(1.0, 0.5)] * 3
    # underneath: (5, 32.125) after the first 9, (7, 24.0625) after the second, (4, 30.03125) after the 1
    close(traces[5].baseline, [4.0, math.sqrt(30.03125)])


def test_level_rule_catches_the_drift_that_no_window_sees() -> None:
    """Mean 1 of the first full window; at the tenth observation the median of the last ten is 3 > 2: trip."""
    drift = [1, 1, 1, 1, 3, 3, 3, 3, 3, 3, None]
    for change, want in (({"level": 2.0}, "a" * 10 + "s"), ({"level": 3.0}, "a" * 11), ({"level": None}, "a" * 11)):
        for baseline in ({}, EMA):
            traces = feed(gated(threshold=1e12, patience=9, **baseline, **change), [*drift[:-1], 3])
            assert outcomes(traces) == want, (change, baseline)
            assert traces[9].tripped is (want[-1] == "s")


def test_level_rule_is_not_moved_by_one_spike() -> None:
    """The mean of the last ten would be: ten thousand times the reference."""
    traces = feed(gated(level=2.0, threshold=1e12, patience=9), [1.0] * 9 + [1e5] + [1.0] * 3)
    assert outcomes(traces) == "a" * 13


def test_level_reference_is_frozen_and_does_not_judge_the_window_that_made_it() -> None:
    """Window 10, mean 5.4, median 9: the tenth observation only sets the reference, the eleventh is judged by it."""
    traces = feed(gated(window=10, level=1.0, threshold=1e12, patience=9), [0] * 4 + [9] * 7)
    assert [t.tripped for t in traces] == [False] * 10 + [True]


@pytest.mark.parametrize(
    ("corrective", "want"), [([1.0, 0.0], 0.0), ([0.0, 5.0], 1.0), ([-3.0, 0.0], 0.0), ([0.0, 0.0], 1.0)]
)
def test_disagreement_is_of_all_tensors_together(corrective: list[float], want: float) -> None:
    """Per-tensor cosines averaged would call (1, 0) against (0, 5) something else; an opposite g~ agrees, by the
    cosine's absolute value; a zero g~ counts as cosine 0."""
    oracle = Oracle(arrays(a=1.0, b=[2.0]), config(gate=GATE | {"statistic": "disagreement"}))
    script = scripted(arrays(a=2, b=[0]), arrays(a=1, b=[0]), arrays(a=corrective[0], b=[corrective[1]]))
    close(oracle.step(script).statistic, want)


@pytest.mark.parametrize(("statistic", "which"), [("initial_norm", 0), ("corrective_norm", 2)])
def test_norm_statistics_are_read_before_clipping(statistic: str, which: int) -> None:
    """After clipping a norm saturates at C: the spike from 5 to 500 under C = 1 would go unseen."""
    oracle = Oracle(arrays(w=[1.0, 2.0]), config(gate=GATE | {"statistic": statistic}, max_grad_norm=1.0))
    for scale in (0.9, 1.1, 0.9, 1.1, 100.0):
        grads = [arrays(w=[30.0, 40.0]) for _ in range(3)]
        grads[which] = arrays(w=[3.0 * scale, 4.0 * scale])
        trace = oracle.step(scripted(*grads))
        close(trace.statistic, 5 * scale)
    assert trace.tripped


def test_without_a_gate_or_with_never_no_value_closes_it() -> None:
    for gate in (None, GATE | {"statistic": "never"}):
        oracle = Oracle(arrays(w=[1.0, 2.0]), config(gate=gate))
        traces = [one(oracle, g=g) for g in (1, 1, 1, 1, 1, 1e9, 1e9)]
        assert outcomes(traces) == "a" * 7
        assert all(t.statistic is None for t in traces)


@pytest.mark.parametrize("supplied", [None, math.nan, math.inf, "1", True])
def test_missing_supplied_statistic_is_refused_before_anything_is_asked(supplied: Any) -> None:
    """Silently observing nothing would leave the user without the protection asked for."""
    oracle, asked = gated(), []
    before = oracle.save()
    with pytest.raises(ValueError, match="supplied must be a finite number"):
        oracle.step(lambda p: asked.append(p), supplied=supplied)
    assert not asked
    assert same(oracle.save(), before)


# ---- When something goes wrong --------------------------------------------------------------------------------------

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


# ---- Save and load --------------------------------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("changes", [{}, EMA, {"level": 1.5}, {"patience": 2, "cooldown": 2}], ids=str)
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

    assert plain(running(ADAMW, level=1.5).save())


def test_state_of_other_parameters_is_refused() -> None:
    saved = Oracle(arrays(v=[1.0]), config()).save()
    with pytest.raises(ValueError, match="names and shapes"):
        Oracle(arrays(w=[1.0]), config()).load(saved)


# ---- Configuration --------------------------------------------------------------------------------------------------


def nested(path: str, value: Any) -> dict:
    settings_ = config(gate=GATE | {"omega": 0.1, "level": None}, optimizer=ADAMW)
    if path in ("optimizer.momentum", "optimizer.name"):
        settings_["optimizer"] = dict(SGD)
    *outer, key = path.split(".")
    (settings_[outer[0]] if outer else settings_)[key] = value
    return settings_


BAD = {
    "horizon": ("an int >= 2", [1, True, 2.0, None]),
    "alpha": ("a finite number >= 0", [-0.1, math.inf, math.nan, "1", True]),
    "estimator": ("one of gradient, displacement, tensor", ["Gradient", None]),
    "optimizer_state": ("one of restore, keep", ["reset"]),
    "max_grad_norm": ("a finite number > 0 or None", [0, -1.0, math.inf]),
    "gate": ("a dict or None", ["never"]),
    "optimizer": ("a dict", [None]),
    "gate.statistic": ("one of corrective_norm, initial_norm, disagreement, supplied, never", ["norm"]),
    "gate.baseline": ("one of window, ema", ["mean"]),
    "gate.window": ("an int >= 2", [1, 30.0]),
    "gate.omega": ("a number in", [0, 1.1, math.nan]),
    "gate.threshold": ("a finite number > 0", [0, math.inf, None]),
    "gate.patience": ("an int >= 1", [0, True]),
    "gate.two_sided": ("true or false", [1, None]),
    "gate.warmup": ("an int >= 0", [-1, None]),
    "gate.cooldown": ("an int >= 0 or None", [-1, 1.5]),
    "gate.max_active_steps": ("an int >= 0 or None", [-1, False]),
    "gate.level": ("a finite number > 0 or None", [0, -1, math.inf]),
    "optimizer.name": ("one of sgd, adamw", ["adam", None]),
    "optimizer.lr": ("a finite number >= 0", [-1, math.nan]),
    "optimizer.momentum": ("a finite number >= 0", [-0.1]),
    "optimizer.betas": ("two numbers in", [[0.9, 1.0], [-0.1, 0.9], [0.9], 0.9]),
    "optimizer.eps": ("a finite number >= 0", [-1e-8]),
    "optimizer.weight_decay": ("a finite number >= 0", [-1]),
}


@pytest.mark.parametrize(
    ("path", "bound", "value"), [(path, bound, v) for path, (bound, values) in BAD.items() for v in values]
)
def test_bad_setting_is_refused_by_name_bound_and_value(path: str, bound: str, value: Any) -> None:
    """A silent acceptance would run another method under the name of this one."""
    with pytest.raises(ValueError, match="must be") as error:
        Oracle(arrays(w=1.0), nested(path, value))
    assert str(error.value).startswith(f"{path} must be {bound}")
    assert str(error.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("path", ["horizons", "gate.windows", "optimizer.beta", "optimizer.dampening"])
def test_unknown_key_is_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key {path}"):
        Oracle(arrays(w=1.0), nested(path, 1))


@pytest.mark.parametrize("path", ["alpha", "gate.patience", "gate.window", "optimizer.betas"])
def test_missing_key_is_refused_by_name(path: str) -> None:
    settings_ = nested(path, 1)
    *outer, key = path.split(".")
    del (settings_[outer[0]] if outer else settings_)[key]
    with pytest.raises(ValueError, match=f"missing key {path}"):
        Oracle(arrays(w=1.0), settings_)


@pytest.mark.parametrize(
    "settings_",
    [
        nested("alpha", 1.5),
        nested("alpha", np.float64(0)),
        nested("horizon", np.int64(2)),
        nested("max_grad_norm", 1),
        nested("gate.max_active_steps", 0),
        nested("gate.cooldown", 0),
        nested("gate.omega", 1),
        nested("optimizer.lr", 0),
        nested("optimizer.betas", (0, 0.5)),
        config(gate={key: value for key, value in GATE.items() if key != "window"} | EMA),
    ],
)
def test_settings_at_their_bounds_are_taken(settings_: dict) -> None:
    assert Oracle(arrays(w=1.0), settings_).step(lambda p: (0.0, p), supplied=1.0).passes in (1, 3)
