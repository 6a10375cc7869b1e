"""gxpo.py beside the numpy oracle, which shares no code with it, at every intermediate point.

If one of these fails, gxpo.py does not compute what the specification says, somewhere inside a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gxpo
from gxpo_conformance.harness.budget import ALLOWED, UNIT_ROUNDOFF, Budget
from gxpo_conformance.harness.findings import to_dtype
from gxpo_conformance.protocol import config
from gxpo_reference import oracle_gate
from gxpo_reference.oracle import Oracle, Trace

SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4)}

optimizers = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.just("sgd"),
            "lr": st.sampled_from([0.0, 0.01, 0.1]),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("adamw"),
            "lr": st.sampled_from([0.001, 0.05]),
            "betas": st.sampled_from([[0.9, 0.999], [0.5, 0.75]]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
)
gates = st.fixed_dictionaries(
    {
        "statistic": st.sampled_from(["corrective_norm", "initial_norm", "disagreement", "supplied", "never"]),
        "baseline": st.sampled_from(["window", "ema"]),
        "window": st.integers(2, 4),
        "omega": st.sampled_from([0.1, 0.5]),
        "threshold": st.sampled_from([0.5, 1.5, 3.0]),
        "patience": st.integers(1, 3),
        "two_sided": st.booleans(),
        "warmup": st.integers(0, 3),
        "cooldown": st.sampled_from([None, 0, 1, 3]),
        "max_active_steps": st.sampled_from([None, 0, 4]),
    }
)
configs = st.fixed_dictionaries(
    {
        "horizon": st.integers(2, 11),
        "alpha": st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0, 1.25]),
        "estimator": st.sampled_from(gxpo.ESTIMATORS),
        "optimizer_state": st.sampled_from(gxpo.STATE_POLICIES),
        "max_grad_norm": st.sampled_from([None, 0.5, 3.0]),
        "optimizer": optimizers,
        "gate": gates,
    }
)


class Both:
    """gxpo.py and the oracle on the same scripted gradients; both record their points."""

    def __init__(self, settings: dict[str, Any], dtype: str, rng: np.random.Generator, device: str = "cpu") -> None:
        self.dtype, self.rng, self.settings = dtype, rng, settings
        theta = {k: to_dtype(rng.normal(size=s) / 4, dtype) for k, s in SHAPES.items()}
        kind = getattr(torch, dtype)
        self.theta = {k: torch.tensor(v, dtype=kind, device=device, requires_grad=True) for k, v in theta.items()}
        base = dict(settings["optimizer"])
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[base.pop("name")]
        self.base = optimizer(self.theta.values(), **base)
        ours = {k: v for k, v in settings.items() if k not in ("optimizer", "gate")}
        self.opt = gxpo.GXPO(self.base, gate=gxpo.Gate(**settings["gate"]), **ours)
        self.after_base: list[dict[str, np.ndarray]] = []
        self.base.register_step_post_hook(lambda *_: self.after_base.append(self.now()))
        self.oracle = Oracle({k: v.astype(np.float64) for k, v in theta.items()}, settings)
        self.budget = Budget(settings, dtype)

    def now(self) -> dict[str, np.ndarray]:
        return {k: p.detach().double().cpu().numpy().copy() for k, p in self.theta.items()}

    def script(self) -> list[dict[str, np.ndarray]]:
        size = 10.0 ** self.rng.uniform(-1, 1)
        drawn = [{k: self.rng.normal(size=s) * size for k, s in SHAPES.items()} for _ in range(3)]
        ratio = {k: self.rng.uniform(-0.9, 2.2, s) for k, s in SHAPES.items()}
        drawn[1] = {k: g * ratio[k] for k, g in drawn[0].items()}
        return [{k: to_dtype(g, self.dtype).astype(np.float64) for k, g in grads.items()} for grads in drawn]

    def step(self) -> tuple[Trace, list[dict[str, np.ndarray]], gxpo.Report]:
        script, supplied = self.script(), float(self.rng.normal(1, 0.3))
        asked: list[dict[str, np.ndarray]] = []
        self.after_base.clear()

        def closure() -> float:
            asked.append(self.now())
            for k, p in self.theta.items():
                p.grad = torch.tensor(script[len(asked) - 1][k]).to(p)
            self.opt.observe(statistic=supplied)
            return 0.5

        self.opt.step(closure)
        self.oracle.params = asked[0]
        answers: Iterator[dict[str, np.ndarray]] = iter(script)
        return self.oracle.step(lambda params: (0.5, next(answers)), supplied=supplied), asked, self.opt.report


def close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], budget: dict[str, np.ndarray], what: str) -> None:
    for k in want:
        allowed = ALLOWED * budget[k]
        assert (np.abs(got[k] - want[k]) <= allowed).all(), (
            what,
            k,
            got[k],
            want[k],
            np.abs(got[k] - want[k]) / allowed,
        )


def near_the_activity_bound(trace: Trace, estimator: str) -> bool:
    """Whether rounding may decide if some coordinate takes part."""
    if "theta2" not in trace.points or estimator == "tensor":
        return False
    first = trace.grads[0]
    if estimator == "displacement":
        first = {k: trace.points["theta1"][k] - trace.points["theta0"][k] for k in first}
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = [np.abs(v) / (1e-3 * np.sqrt(np.mean(v**2))) for v in first.values()]
    return any(((s > 0.9) & (s < 1.1)).any() for s in shares)


def compare_steps(settings: dict[str, Any], dtype: str, seed: int, steps: int, device: str = "cpu") -> list[str]:
    """Run both, comparing everything there is to see; returns the outcomes."""
    both, outcomes = Both(settings, dtype, np.random.default_rng(seed), device), []
    u = UNIT_ROUNDOFF[dtype] if dtype != "bfloat16" else UNIT_ROUNDOFF["float32"]
    for n in range(steps):
        trace, asked, report = both.step()
        budgets, end = both.budget.step(trace)
        gate = settings["gate"]
        # How many roundings of the statistic z is worth: a calm baseline magnifies them.
        steep = 0.0 if trace.z is None else 200 * u * (1 + abs(trace.statistic)) / (trace.baseline[1] + 1e-9)
        near = trace.z is not None and abs(abs(trace.z) - gate["threshold"]) < 1e-3 + steep
        if near or near_the_activity_bound(trace, settings["estimator"]):
            break  # rounding may decide otherwise from here on
        assert (report.step, report.outcome, report.passes) == (n, trace.outcome, trace.passes)
        assert len(asked) == len(trace.asked)
        for got, want, budget, name in zip(asked, trace.asked, budgets, ("theta0", "theta1", "theta~"), strict=False):
            close(got, want, budget, f"step {n}, {name}")
        close(both.now(), trace.points["theta'"], end, f"step {n}, theta'")
        assert report.grad_norms == pytest.approx(trace.norms, rel=50 * u)
        if trace.outcome == "active":
            # theta2 is never asked at; the budget of theta~ at alpha q >= 1 covers it
            within = {
                k: b + budgets[1][k] + 8 * both.budget.u * np.abs(trace.points["theta2"][k]) for k, b in end.items()
            }
            close(both.after_base[1], trace.points["theta2"], within, f"step {n}, theta2")
            q = np.concatenate([v.ravel() for v in trace.q.values()])
            if settings["estimator"] == "gradient" and dtype != "bfloat16":
                assert report.mean_q == pytest.approx(q.mean(), rel=500 * u)
            if n < gate["warmup"]:
                assert trace.statistic is None
            elif trace.statistic is None:
                assert report.statistic is None
            else:
                assert report.statistic == pytest.approx(trace.statistic, rel=100 * u, abs=100 * u)
        assert (report.z is None) == (trace.z is None)
        if trace.z is not None:
            assert report.z == pytest.approx(trace.z, rel=1e-9 + 100 * u, abs=steep)
        assert report.streak == trace.streak
        if trace.tripped and gate["cooldown"] != 0:
            assert not both.opt.active
        outcomes.append(report.outcome)
    return outcomes


@given(configs, st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_every_point_in_float64(drawn: dict[str, Any], seed: int) -> None:
    compare_steps(config(**drawn), "float64", seed, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(configs, st.integers(0, 2**32 - 1))
@settings(max_examples=75)
def test_every_point_in_narrow_types(dtype: str, drawn: dict[str, Any], seed: int) -> None:
    if dtype == "bfloat16":  # displacements are mostly rounding there (SPEC.md, Budgets)
        drawn = {**drawn, "estimator": "gradient"}
    compare_steps(config(**drawn), dtype, seed, 4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_long_run_falls_back_where_the_oracle_does(dtype: str, device: str) -> None:
    """A drift between the two over many steps would move the step that trips."""
    settings = config(
        horizon=5,
        alpha=0.5,
        gate={"window": 5, "threshold": 2.5, "patience": 1},
        optimizer={"name": "adamw", "lr": 1e-3},
    )
    outcomes = compare_steps(settings, dtype, 11, 40, device)
    assert len(outcomes) == 40
    assert set(outcomes) == {"active", "single"}


@given(gates, st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
@settings(max_examples=300)
def test_the_gate_alone_over_long_series(drawn: dict[str, Any], seed: int, spread: float) -> None:
    """Windows fill, streaks open and break, drifts and cooldowns come and go: every decision, on 80 steps."""
    if drawn["statistic"] == "never":
        return
    gate, state, theirs = gxpo.Gate(**drawn), gxpo.GateState(), oracle_gate.Gate()
    rng = np.random.default_rng(seed)
    series = 1 + spread * rng.standard_t(2, 80) + rng.choice([0.0, 0.02]) * np.arange(80)
    for step, h in enumerate(series):
        active = not oracle_gate.why_closed(theirs, drawn, step)
        assert gate.is_open(state) == active
        state, z, streak = gate.after(state, active, float(h) if active else None)
        if not active:
            continue
        theirs = dataclasses.replace(theirs, completed=theirs.completed + 1)
        want = {"z": None, "streak": 0, "tripped": False}
        if step >= drawn["warmup"]:
            theirs, want = oracle_gate.observe(theirs, drawn, step, float(h))
        assert z == (None if want["z"] is None else pytest.approx(want["z"], rel=1e-6, abs=1e-6))
        assert streak == want["streak"]
        assert (state.fallback_step == step) == (want["tripped"] or state.active_steps == drawn["max_active_steps"])


def test_a_score_at_the_threshold_counts() -> None:
    """z >= threshold, not above it."""
    state = gxpo.GateState()
    for h in (1.0, 1.25, 0.75, 1.0):
        state, _, _ = gxpo.Gate(window=4).after(state, True, h)
    z = gxpo.Gate(window=4).after(state, True, 2.0)[1]
    assert gxpo.Gate(window=4, threshold=z, patience=1).after(state, True, 2.0)[0].fallback_step == 4


def test_a_vanishing_corrective_gradient_disagrees_wholly() -> None:
    """cos(g0, 0) counts as 0: landing on a stationary point is no agreement with g0, and no division by zero."""
    theta = torch.ones(2, requires_grad=True)
    opt = gxpo.GXPO(torch.optim.SGD([theta], lr=0.1), gate=gxpo.Gate("disagreement"))
    for n in opt.passes():
        theta.grad = torch.tensor([1.0, 2.0]) * (n < 2)
    assert (opt.report.outcome, opt.report.statistic) == ("active", 1.0)


@pytest.mark.parametrize("baseline", gxpo.BASELINES)
def test_huge_norms_are_no_error(baseline: str) -> None:
    """Python's ** raises where the square of a float overflows: a finite float64 gradient would end the run."""
    gate, state = gxpo.Gate(baseline=baseline, window=3), gxpo.GateState()
    for h in (1e200, 2e200, 1e200, 1e200, 1.0, 1e200):
        state, _, _ = gate.after(state, True, h)
    assert state.seen == 6
