"""Shapes and sessions, identities that need no oracle, and whole runs on the toy problems."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gxpo_conformance.bench import Bench, CaseError, Failure, Recorder, Source, check_close, to_dtype, zeros
from gxpo_conformance.budget import ALLOWED, UNIT_ROUNDOFF, Budget
from gxpo_conformance.checks import check
from gxpo_conformance.protocol import Arrays, Config, Gradient, config
from gxpo_reference.oracle import Oracle
from gxpo_toy_tasks.bandits import Bandit, ContextualBandit
from gxpo_toy_tasks.quadratics import Quadratic

THETA = np.array([0.5, -0.25, 1.0, -1.0, 0.125, 0.75, -0.5, 0.25])
G0 = np.array([1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0, 0.75])
R = np.array([0.5, 0.75, -0.25, 1.0, 0.875, 1.125, 0.25, 0.625])
SCRIPT = [{"w": G0}, {"w": G0 * R}, {"w": G0 * 0.5}]


@check("DEV-01", coarse=True)
def any_shape_will_do(bench: Bench) -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (2, 3), (2, 1, 2)]
    theta = {f"t{n}": np.resize(THETA, s) for n, s in enumerate(shapes)}
    run = bench.begin(theta, config(horizon=4))
    for scale in (1.0, 0.5):
        g0 = {f"t{n}": np.resize(G0, s) * scale for n, s in enumerate(shapes)}
        g1 = {k: g * np.resize(R, g.shape) for k, g in g0.items()}
        run.step([g0, g1, g0])


@check("DEV-02", coarse=True)
def arrays_are_not_shared(bench: Bench) -> None:
    start = {"w": to_dtype(THETA, bench.dtype)}
    session = bench.session(start, bench.config(config()))
    before = bench.params(session, start)
    handed_out = bench.call("params()", session.params)
    if handed_out["w"].flags.writeable:
        handed_out["w"] += 1.0
    check_close(
        bench.params(session, start), before, zeros(before), "after the caller changed what params() gave, theta"
    )


def points(bench: Bench, theta: Arrays, settings: Config, steps: Sequence[Source]) -> list[Arrays]:
    """Every point the port asks at, and the end of every step; no oracle."""
    now = {k: to_dtype(v, bench.dtype) for k, v in theta.items()}
    session = bench.session(now, bench.config(settings))
    seen: list[Arrays] = []
    for source in steps:
        recorder = Recorder(source, bench.dtype, now)
        bench.call("step", lambda recorder=recorder: session.step(recorder))
        now = bench.params(session, now)
        seen += [*recorder.asked, now]
    return seen


def agree(bench: Bench, got: Arrays, want: Arrays, scale: float, roundings: float, what: str) -> None:
    """Within so many roundings of numbers of this size."""
    budget = {k: np.full(v.shape, roundings * scale * UNIT_ROUNDOFF[bench.dtype] / ALLOWED) for k, v in want.items()}
    check_close(got, {k: np.asarray(v, dtype=np.float64) for k, v in want.items()}, budget, what)


def same(one: list[Arrays], other: list[Arrays], what: str, bench: Bench, roundings: float = 0.0) -> None:
    if len(one) != len(other):
        raise Failure(f"{what}: {len(other)} points in place of {len(one)}")
    for n, (a, b) in enumerate(zip(one, other, strict=True)):
        agree(bench, b, a, 8.0, roundings, f"{what}: point {n}")


@check("INV-01", coarse=True)
def horizon_two_is_two_step_lookahead(bench: Bench) -> None:
    for alpha in (0.5, 1.0):
        asked = points(bench, {"w": THETA}, config(horizon=2, alpha=alpha), [SCRIPT])
        want = THETA - alpha * 0.125 * (SCRIPT[0]["w"] + SCRIPT[1]["w"])
        agree(bench, asked[2], {"w": want}, 2.0, 8, "theta~ of two-step lookahead")


@check("INV-02", coarse=True)
def alpha_zero_steps_from_theta0(bench: Bench) -> None:
    asked = points(bench, {"w": THETA}, config(alpha=0.0), [SCRIPT])
    agree(bench, asked[2], {"w": THETA}, 2.0, 8, "theta~ at alpha = 0")
    agree(bench, asked[3], {"w": THETA - 0.125 * SCRIPT[2]["w"]}, 2.0, 8, "theta' at alpha = 0")


@check("INV-03", coarse=True)
def a_linear_loss_lands_k_steps_away(bench: Bench) -> None:
    for horizon in (2, 3, 5, 10):
        asked = points(bench, {"w": THETA}, config(horizon=horizon), [[{"w": G0}] * 3])
        agree(bench, asked[2], {"w": THETA - horizon * 0.125 * G0}, 2.0 + horizon / 4, 8, f"theta~ at K = {horizon}")


def bowl(curvature: np.ndarray) -> Gradient:
    def gradient(params: Arrays) -> tuple[float, Arrays]:
        return float(np.sum(curvature * params["w"] ** 2) / 2), {"w": curvature * params["w"]}

    return gradient


@check("INV-04")
def a_diagonal_quadratic_is_predicted_exactly(bench: Bench) -> None:
    curvature = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625])
    for horizon in (2, 3, 5, 10):
        asked = points(bench, {"w": THETA}, config(horizon=horizon), [bowl(curvature)])
        want = THETA * (1 - 0.125 * curvature) ** (horizon + 1)
        # a rounding of the ratio is worth up to K of the move
        agree(bench, asked[3], {"w": want}, 1.0, 16 * horizon, f"theta' against K + 1 = {horizon + 1} plain steps")


@check("INV-05")
def scaling_loss_and_rate_changes_nothing(bench: Bench) -> None:
    plain = points(bench, {"w": THETA}, config(alpha=0.5), [SCRIPT] * 2)
    tiny = [{k: g * 2.0**-14 for k, g in grads.items()} for grads in SCRIPT]
    scaled = points(bench, {"w": THETA}, config(alpha=0.5, optimizer={"lr": 0.125 * 2.0**14}), [tiny] * 2)
    same(plain, scaled, "loss times 2^-14, learning rate times 2^14", bench, 4)


def reshaped(
    bench: Bench, there: Callable[[np.ndarray], Arrays], back: Callable[[Arrays], np.ndarray], what: str
) -> None:
    settings = config(alpha=0.5)
    plain = points(bench, {"w": THETA}, settings, [SCRIPT] * 2)
    other = points(bench, there(THETA), settings, [[there(g["w"]) for g in SCRIPT]] * 2)
    same(plain, [{"w": back(p)} for p in other], what, bench, 4)


@check("INV-06")
def permuting_coordinates_permutes_the_step(bench: Bench) -> None:
    order = np.array([3, 7, 0, 5, 1, 6, 2, 4])
    reshaped(bench, lambda w: {"w": w[order]}, lambda p: p["w"][np.argsort(order)], "coordinates permuted")


@check("INV-07")
def names_do_not_matter(bench: Bench) -> None:
    halves = config(alpha=0.5)
    split = [{"a": g["w"][:4], "b": g["w"][4:]} for g in SCRIPT]
    plain = points(bench, {"a": THETA[:4], "b": THETA[4:]}, halves, [split] * 2)
    named = [{"z.weight": g["a"], "0": g["b"]} for g in split]
    other = points(bench, {"z.weight": THETA[:4], "0": THETA[4:]}, halves, [named] * 2)
    same(plain, [{"a": p["z.weight"], "b": p["0"]} for p in other], "tensors renamed", bench, 4)


@check("INV-08")
def splitting_a_tensor_changes_nothing(bench: Bench) -> None:
    # g0's halves have equal RMS: up to order and sign they hold the same numbers.
    g0 = np.array([1.0, -2.0, 0.5, 2.0**-12, 2.0**-12, 0.5, 2.0, -1.0])
    script = [{"w": g0}, {"w": g0 * R}, {"w": g0}]
    split = [{"a": g["w"][:4], "b": g["w"][4:]} for g in script]
    plain = points(bench, {"w": THETA}, config(horizon=4), [script])
    other = points(bench, {"a": THETA[:4], "b": THETA[4:]}, config(horizon=4), [split])
    same(plain, [{"w": np.concatenate([p["a"], p["b"]])} for p in other], "one tensor split in two", bench, 4)


@check("INV-09")
def sessions_do_not_touch_each_other(bench: Bench) -> None:
    momentum = {"lr": 0.125, "momentum": 0.5}
    one = bench.begin({"w": THETA}, config(horizon=4, optimizer=momentum, gate={"window": 2}))
    two = bench.begin({"w": -THETA}, config(horizon=5, optimizer=momentum, gate={"window": 3}))
    for scale in (1.0, 0.5, 0.75):
        script = [{"w": g["w"] * scale} for g in SCRIPT]
        one.step(script)
        two.step([{"w": -2.0 * g["w"]} for g in script])


@check("INV-10", coarse=True)
def the_same_inputs_give_the_same_bits(bench: Bench) -> None:
    settings = config(alpha=0.5, optimizer={"lr": 0.1})
    first = points(bench, {"w": THETA}, settings, [SCRIPT] * 3)
    same(first, points(bench, {"w": THETA}, settings, [SCRIPT] * 3), "the same run again", bench)


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

    def trial(rng: np.random.Generator | None) -> tuple[list[str], float]:
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

    outcomes, value = trial(None)
    if not 5 < outcomes.count("active") < problem.steps - 5:
        raise CaseError(f"{problem.name}: {outcomes.count('active')} active steps show no run into fallback")
    others = [trial(np.random.default_rng(seed)) for seed in range(8)]
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

    def judge(self, bench: Bench) -> None:
        gate = {"window": 8, "threshold": 2.0}
        settings = bench.config(config(alpha=0.5, gate=gate, optimizer={"lr": self.lr}))
        free = free_run(self, json.dumps(settings), bench.dtype)
        run = bench.begin(self.start(), settings)
        for n, outcome in enumerate(free.outcomes):
            theta0 = {k: v.astype(np.float64) for k, v in run.now.items()}
            try:
                trace = run.step(self.objective(n, theta0))
            except Failure as failure:
                raise Failure(f"{self.name}: {failure}") from None
            if trace.outcome != outcome:  # the port was followed, so it is its parameters that led elsewhere
                raise Failure(f"{self.name}: step {n} is {trace.outcome}, {outcome} in the oracle's own run")
        reached = self.value({k: v.astype(np.float64) for k, v in run.now.items()})
        allowed = 4 * free.spread + 64 * UNIT_ROUNDOFF[bench.dtype]
        if not abs(reached - free.value) <= allowed:
            raise Failure(f"{self.name} ends at {reached!r}, should be {free.value!r} within {allowed:.1e}")


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
        "TOY-02": [policy(Bandit(seed=seed, on_policy=True), f"softmax bandit, seed {seed}") for seed in (14, 21)],
        "TOY-03": [
            policy(ContextualBandit(seed=seed, on_policy=True), f"contextual bandit, seed {seed}") for seed in (5, 19)
        ],
    }


@check("TOY-01")
def quadratics_are_followed_into_fallback(bench: Bench) -> None:
    for problem in toys()["TOY-01"]:
        problem.judge(bench)


@check("TOY-02")
def the_bandit_is_followed_into_fallback(bench: Bench) -> None:
    for problem in toys()["TOY-02"]:
        problem.judge(bench)


@check("TOY-03")
def the_contextual_bandit_is_followed_into_fallback(bench: Bench) -> None:
    for problem in toys()["TOY-03"]:
        problem.judge(bench)
