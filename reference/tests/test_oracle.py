"""The numpy oracle's steps against torch.optim, closed forms and numbers worked out by hand.

The oracle says what is right for every port, so nothing here leans on another implementation of GXPO.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_cases import ADAMW, GATE, SGD, arrays, close, config, drawn, same, scripted

from gxpo_reference.oracle import Oracle

# ---- The optimizers --------------------------------------------------------------------------------------------------

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


# ---- The active step -------------------------------------------------------------------------------------------------


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
