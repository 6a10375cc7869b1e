"""Whole runs on the toy problems, through the trip and into fallback."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.budget import ALLOWED, UNIT_ROUNDOFF, Budget
from gxpo_conformance.harness.findings import CaseError, Failure, in_float64
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import Arrays, Gradient, config
from gxpo_reference.oracle import Oracle
from gxpo_toy_tasks.tasks.bandits import Bandit, ContextualBandit
from gxpo_toy_tasks.tasks.quadratics import Quadratic

WINDOW: dict[str, object] = {"window": 8, "threshold": 2.0}
Objective = Callable[[int, Arrays], Gradient]  # (step, theta0) -> the gradient of that step's batch


@dataclass
class FreeRun:
    """The oracle's own run of a toy problem, and how far its value moves when every step errs by its whole budget."""

    outcomes: list[str]
    value: float
    spread: float


@functools.cache
def free_run(problem: Problem, settings_key: str, dtype: str) -> FreeRun:
    settings = json.loads(settings_key)

    def once(rng: np.random.Generator | None) -> tuple[list[str], float]:
        oracle, budget, outcomes = Oracle(problem.start(), settings), Budget(settings, dtype), []
        for n in range(problem.steps):
            theta0 = {k: v.copy() for k, v in oracle.params.items()}
            trace = oracle.step(problem.objective(n, theta0))
            outcomes.append(trace.outcome)
            if rng is None:
                threshold = settings["gate"]["threshold"]
                if trace.z is not None and abs(trace.z - threshold) < 0.1 * threshold:
                    raise CaseError(f"{problem.name}: z = {trace.z} at step {n} lies within 10 % of {threshold}")
            else:
                end = budget.step(trace)[1]
                off = {k: ALLOWED * e * rng.choice([-1.0, 1.0], e.shape) for k, e in end.items()}
                oracle.params = {k: v + off[k] for k, v in oracle.params.items()}
        return outcomes, problem.value(oracle.params)

    outcomes, value = once(None)
    if not 5 < outcomes.count("active") < problem.steps - 5:
        raise CaseError(f"{problem.name}: {outcomes.count('active')} active steps show no run into fallback")
    others = [once(np.random.default_rng(seed)) for seed in range(8)]
    if any(o != outcomes for o, _ in others):
        raise CaseError(f"{problem.name}: rounding decides when the gate trips")
    return FreeRun(outcomes, value, max(abs(v - value) for _, v in others))


@dataclass(frozen=True)
class Problem:
    """A toy problem as a whole run: `start` and `objective` make it, `value` is what it is about at the end."""

    name: str
    start: Callable[[], Arrays]
    objective: Objective
    value: Callable[[Arrays], float]
    lr: float
    steps: int = 40

    def judge(self, harness: Harness) -> None:
        windowed = "window" in harness.capabilities["gate_baselines"]
        gate = WINDOW if windowed else ema_gate(self, harness.dtype)
        settings = harness.config(config(alpha=0.5, gate=gate, optimizer={"lr": self.lr}))
        free = free_run(self, json.dumps(settings), harness.dtype)
        run = harness.begin(self.start(), settings)
        for n, outcome in enumerate(free.outcomes):
            theta0 = in_float64(run.talk.now)
            try:
                trace = run.step(self.objective(n, theta0))
            except Failure as failure:
                raise failure.within(self.name) from failure.__cause__
            if trace.outcome != outcome:  # the port was followed, so it is its parameters that led elsewhere
                raise Failure(f"{self.name}: step {n} is {trace.outcome}, {outcome} in the oracle's own run")
        reached = self.value(in_float64(run.talk.now))
        allowed = 4 * free.spread + 64 * UNIT_ROUNDOFF[harness.dtype]
        if not abs(reached - free.value) <= allowed:
            raise Failure(f"{self.name} ends at {reached!r}, should be {free.value!r} within {allowed:.1e}")


@functools.cache
def ema_gate(problem: Problem, dtype: str) -> dict[str, object]:
    """For a port that has no window: an `ema` gate that trips in mid-run, no score near its threshold."""
    for omega in (0.1, 0.2, 0.3, 0.5):
        for tenths in range(8, 80, 3):
            gate = {"baseline": "ema", "omega": omega, "threshold": tenths / 10}
            settings = [
                config(alpha=0.5, gate=gate, optimizer={"lr": problem.lr}, optimizer_state=policy)
                for policy in ("keep", "restore")
            ]
            with contextlib.suppress(CaseError):
                for each in settings:
                    free_run(problem, json.dumps(each), dtype)
                return gate
    raise CaseError(f"{problem.name}: no ema gate trips in mid-run")


def noisy(problem: Quadratic, name: str, seed: int) -> Problem:
    """Batches that each pull to a minimum of their own; one of them is far out and trips the gate."""
    rng = np.random.default_rng(seed)
    pulls = rng.normal(size=(40, problem.start.size)) * np.where(np.arange(40) == 24, 8.0, 0.5)[:, None]

    def objective(step: int, theta0: Arrays) -> Gradient:
        return lambda params: problem.gradient({"x": params["x"] - pulls[step]})

    return Problem(name, problem.initial, objective, problem.loss, lr=0.25)


def policy(bandit: Bandit | ContextualBandit, name: str) -> Problem:
    return Problem(name, bandit.initial, bandit.objective, bandit.reward, lr=1.0)


@functools.cache
def toys() -> dict[str, list[Problem]]:
    """Seeds are chosen so that the gate trips in mid-run and no score comes near the threshold; free_run sees to it."""
    return {
        "TOY-01": [
            noisy(Quadratic.diagonal(condition=10.0), "diagonal quadratic", 0),
            noisy(Quadratic.rotated(condition=100.0), "rotated quadratic", 1),
            noisy(Quadratic.ill_conditioned(), "ill-conditioned quadratic", 2),
        ],
        "TOY-02": [policy(Bandit(seed=14, on_policy=True), "softmax bandit")],
        "TOY-03": [policy(ContextualBandit(seed=5, on_policy=True), "contextual bandit")],
    }


@check("TOY-01")
def quadratics_are_followed_into_fallback(harness: Harness) -> None:
    for problem in toys()["TOY-01"]:
        problem.judge(harness)


@check("TOY-02")
def the_bandit_is_followed_into_fallback(harness: Harness) -> None:
    for problem in toys()["TOY-02"]:
        problem.judge(harness)


@check("TOY-03")
def the_contextual_bandit_is_followed_into_fallback(harness: Harness) -> None:
    for problem in toys()["TOY-03"]:
        problem.judge(harness)
