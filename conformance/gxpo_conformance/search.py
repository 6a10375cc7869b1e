"""Random cases beyond the fixed ones, shrunk to the smallest that fails: `gxpo-conformance search`.

Whatever a port declares is mixed: configurations, shapes, gradients that are zero, non-finite or raise, resumes. Every
step is judged at every point, beside the oracle. Cases that rounding alone could decide (a score near the threshold, a
coordinate near the activity bound) are thrown away, so that no right port is rejected.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gxpo_conformance.harness.budget import UNIT_ROUNDOFF
from gxpo_conformance.harness.case import Case, as_case
from gxpo_conformance.harness.findings import CaseError, Failure
from gxpo_conformance.harness.harness import Harness, Recorder
from gxpo_conformance.protocol import AdapterError, Arrays, Config, config, declares
from gxpo_reference.oracle import Trace

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError as missing:  # the suite itself does without
    raise AdapterError("search needs hypothesis: pip install hypothesis") from missing

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.125},
    "momentum": {"lr": 0.125, "momentum": 0.5, "weight_decay": 0.125},
    "adamw": {"name": "adamw", "lr": 0.0625, "betas": [0.5, 0.75], "eps": 2.0**-10, "weight_decay": 0.125},
}
VALUES = [1.0, -1.0, 0.5, 2.0, -0.25, 1.5, 0.0]  # none near 1e-3 of any RMS; exact in every dtype
RATIOS = [1.0, 0.5, 0.75, 0.0, 1.25, -0.5, -1.0, 3.5, -2.5]
LOUD = [1.0, 0.5, 1.25, 0.75, 8.0, 64.0]  # |g~| relative to the usual one
BAD = [math.nan, math.inf]
ODD = {"resume": "checkpoint", "non-finite": "nonfinite", "raise": "exceptions"}  # and the capability that it needs


@dataclass(frozen=True)
class Step:
    """One outer step: three gradients, and what is odd about it, if anything (in gradient `at`, from 0)."""

    script: list[Arrays]
    odd: str
    at: int


Plan = tuple[Config, Arrays, list[Step]]


@st.composite
def settings(draw: st.DrawFn, harness: Harness) -> Config:
    """A configuration within what the port declares."""
    declared, coarse = harness.capabilities, harness.dtype == "bfloat16"
    # In bfloat16 displacements mostly round away (SPEC.md, Budgets).
    estimator = draw(st.sampled_from([e for e in declared["estimators"] if not (coarse and e == "displacement")]))
    names = ["sgd", "momentum", *(["adamw"] if "adamw" in declared["optimizers"] else [])]
    optimizer = "sgd" if coarse and estimator == "tensor" else draw(st.sampled_from(names))
    options = {"patience": st.integers(1, 3), "two_sided": st.booleans(), "warmup": st.integers(0, 3)}
    options |= {"cooldown": st.none() | st.integers(0, 3), "max_active_steps": st.none() | st.integers(0, 6)}
    return config(
        horizon=draw(st.sampled_from([2, 3, 4, 5, 7, 10])),
        alpha=draw(st.sampled_from([1.0, 0.5, 0.25, 0.0])),
        estimator=estimator,
        optimizer_state=draw(st.sampled_from(declared["optimizer_state"])),
        max_grad_norm=draw(st.none() | st.sampled_from([1.0, 4.0])) if declared["max_grad_norm"] else None,
        gate={
            "window": draw(st.integers(2, 4)),
            "statistic": draw(st.sampled_from(declared["gate_statistics"])),
            "baseline": draw(st.sampled_from(declared["gate_baselines"])),
            **{name: draw(values) for name, values in options.items() if name in declared["gate_options"]},
        },
        optimizer=OPTIMIZERS[optimizer],
    )


@st.composite
def steps(draw: st.DrawFn, harness: Harness, shapes: dict[str, tuple[int, ...]]) -> Step:
    def arrays(values: list[float]) -> Arrays:
        sizes = {k: math.prod(shape) for k, shape in shapes.items()}
        drawn = {k: draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)) for k, n in sizes.items()}
        return {k: np.array(values).reshape(shapes[k]) for k, values in drawn.items()}

    g0, r, loud = arrays(VALUES), arrays(RATIOS), draw(st.sampled_from(LOUD))
    script = [g0, {k: g * r[k] for k, g in g0.items()}, {k: g * loud for k, g in arrays(VALUES[:-1]).items()}]
    kinds = [kind for kind, need in ODD.items() if declares(harness.capabilities, need)]
    odd = draw(st.sampled_from(["", "", "", "", *kinds]))
    at = draw(st.integers(0, 2)) if odd else 0
    if odd == "non-finite":
        script[at] = {k: np.full(g.shape, draw(st.sampled_from(BAD))) for k, g in script[at].items()}
    return Step(script, odd, at)


@st.composite
def plans(draw: st.DrawFn, harness: Harness) -> Plan:
    made = draw(settings(harness))
    chosen = draw(st.lists(st.sampled_from([(3,), (2, 2), (), (1,)]), min_size=1, max_size=3))
    shapes = {f"t{n}": shape for n, shape in enumerate(chosen)}
    start = {k: np.full(shape, draw(st.sampled_from([0.0, 0.5, -1.0]))) for k, shape in shapes.items()}
    return made, start, draw(st.lists(steps(harness, shapes), min_size=1, max_size=9))


def decided(trace: Trace, made: Config, dtype: str) -> bool:
    """Whether this step is far from anything that rounding could turn the other way."""
    if trace.baseline is not None and trace.statistic is not None:
        (mu, sigma), gate = trace.baseline, made["gate"]
        off = 256 * UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"] * max(mu, trace.statistic, 1.0)
        h = trace.statistic - mu
        least, most = (abs(h) - off) / (sigma + off), (abs(h) + off) / (max(sigma - off, 0.0) + 1e-9)
        if least < gate["threshold"] < most and (h > -off or gate["two_sided"]):
            return False
    if made["estimator"] == "displacement" and trace.q is not None:
        for k, theta0 in trace.points["theta0"].items():
            u0 = np.abs(trace.points["theta1"][k] - theta0)
            bound = 1e-3 * np.sqrt(np.mean(u0**2))
            if ((u0 > 0) & (u0 < 1.1 * bound)).any():
                return False
    return True


def play(harness: Harness, plan: Plan) -> None:
    """Failure where the port leaves the oracle, CaseError where the case is unfit."""
    made, start, planned = plan
    run = harness.begin(start, made)
    run.fit = lambda trace: decided(trace, run.config, harness.dtype)
    for step in planned:
        if step.odd == "raise":
            ahead = copy.copy(run.oracle)
            if ahead.step(Recorder(step.script, harness.dtype, run.talk.now).replay()).passes > step.at:
                run.raising(step.script, step.at)
            continue
        if step.odd == "resume":
            run.talk.resume(then=step.script)
        run.step(step.script)


def search(harness: Harness, seed: int, cases: int) -> tuple[Failure, Case] | None:
    """The smallest failing case that `cases` random ones lead to; None where none fails."""
    found: list[Failure] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]  # typed as iterating over the metaclass
    )
    @hypothesis.given(plans(harness))
    def property_of_a_right_port(plan: Plan) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what a port prints
                play(harness, plan)
        except CaseError:
            hypothesis.reject()
        except Failure as failure:
            found.append(failure)
            raise

    try:
        property_of_a_right_port()
    except Failure:  # the smallest is the last that was played
        assert harness.latest is not None
        return found[-1], as_case(harness.latest)
    return None
