"""What the files hold: the suite's cases as the oracle plays them, and q and r of a few inputs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.budget import UNIT_ROUNDOFF
from gxpo_conformance.harness.case import INTERRUPT, Case, as_case, replay
from gxpo_conformance.harness.findings import CaseError, Failure
from gxpo_conformance.harness.harness import Dialogue, Harness
from gxpo_conformance.mutants.model import ModelPort
from gxpo_conformance.mutants.right import NeutralAtMinusOne
from gxpo_conformance.protocol import config, everything
from gxpo_conformance.runs import play
from gxpo_conformance.trial import attempt
from gxpo_conformance.wire import from_wire
from gxpo_reference.oracle import cosine, extrapolation_scale, global_norm, retention_ratio

U = UNIT_ROUNDOFF["float64"]
ABOUT_THE_STEP = ("GAT-07", "GAT-08", "GAT-20", "GAT-21", "GAT-22", "GAT-26")  # what is observed, not how it is scored
ABOUT_SEVERAL_RUNS = ("INV-05", "INV-06", "INV-07", "INV-08", "INV-09", "INV-10")  # one run shows nothing of them
ABOUT_ARRAYS = ("DEV-02", "DEV-03")  # handed out, in another order and layout: a file shows nothing of them
WHOLE_RUNS = ("TOY", "RND")  # the gradients of the former depend on where the port is, the latter come with a seed
# Parameters and whole steps in a case: the files would grow by half a megabyte with each tensor of thousands.
MOST_NUMBERS, MOST_STEPS = 400, 20
INPUTS = {  # what makes a case the case it is
    "scale": ("clause", "horizon", "r"),
    "ratio": ("clause", "horizon", "g0", "g1", "c0", "c1"),
    "step": ("clause", "config", "params", "answers", "statistic", "resume"),
    "gate": ("clause", "gate", "h"),
    "run": ("clause", "config", "params", "answers", "statistic", "resume"),
}
KINDS = tuple(INPUTS)


def make() -> dict[str, list[Case]]:
    """Every case of every kind but `run`, without ids and margins."""
    runs = played()
    return {
        "scale": scale_cases(),
        "ratio": ratio_cases(),
        "step": [dict(case) for case in runs["step"]],
        "gate": [gate_only(case) for case in runs["gate"]],
    }


def inputs(kind: str, case: Case) -> str:
    """What is put into a case, as text; numbers to twelve digits, for the last ones are the machine's."""
    steps = case.get("steps", [])
    given = {**case, **{key: [step.get(key) for step in steps] for key in ("h", "answers", "statistic")}}
    given["resume"] = [step.get("resume", False) for step in steps]
    return json.dumps(to_digits({key: given[key] for key in INPUTS[kind]}, 12), sort_keys=True)


def to_digits(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {k: to_digits(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [to_digits(v, digits) for v in value]
    return float(f"{value:.{digits - 1}e}") if isinstance(value, float) else value


# ---- Whole steps -----------------------------------------------------------------------------------------------------


def the_oracle() -> Harness:
    return Harness(oracle_adapter.Port(), everything(), "float64", "cpu")


@functools.cache
def played() -> dict[str, list[Case]]:
    """The fixed cases of every clause that a file can show, played with the oracle as the port, as whole steps; by the
    kind that they are for. Not to be changed: it is kept."""
    made: dict[str, dict[str, Case]] = {"step": {}, "gate": {}}
    for clause in clauses():
        check = CHECKS[clause]
        left_out = clause.startswith(WHOLE_RUNS) or clause in ABOUT_SEVERAL_RUNS + ABOUT_ARRAYS
        if left_out or "float64" not in check.dtypes:
            continue
        harness = the_oracle()
        if failure := attempt(clause, harness):
            raise failure
        comment = check.function.__name__.replace("_", " ")
        for talk in harness.talks:
            if not talk.steps or size(talk) > MOST_NUMBERS:
                continue
            case = described(clause, comment, talk)
            kind = kind_of(case)
            if has_two_right_answers(case) or (kind == "step" and len(case["steps"]) > MOST_STEPS):
                continue
            made[kind].setdefault(inputs(kind, case if kind == "step" else gate_only(case)), case)
    return {kind: list(cases.values()) for kind, cases in made.items()}


def size(talk: Dialogue) -> int:
    """How many parameters there are."""
    return sum(array.size for array in talk.start.values())


def described(clause: str, comment: str, talk: Dialogue, **more: str) -> Case:
    case = as_case(talk)
    return {"clause": clause, "comment": comment, **more, "flags": flags(case), **case}


def has_two_right_answers(case: Case) -> bool:
    """Whether it stands at r = -1 with an even K, where q = 1 is as right as K/2 (EXT-05): a file has one answer."""
    harness = Harness(ModelPort(NeutralAtMinusOne, "neutral at r = -1"), everything(), "float64", "cpu")
    try:
        return replay(harness, case) > 1
    except Failure:
        return True


def kind_of(case: Case) -> str:
    """`gate` where the clause is about scores and the gate alone decides what each step is."""
    clause = case["clause"]
    about_scores = clause.startswith("GAT") and clause not in ABOUT_THE_STEP
    return "gate" if about_scores and all(decided_by_the_gate(step) for step in case["steps"]) else "step"


def decided_by_the_gate(step: dict[str, Any]) -> bool:
    return step["outcome"] == "active" or (step["outcome"] == "single" and step["why"] != "zero gradient")


def gate_only(case: Case) -> Case:
    """What a gate on its own has to be told, and to say."""
    about = {key: case[key] for key in ("clause", "comment", "flags")}
    steps = [{k: v for k, v in step["gate"].items() if k != "streak"} for step in case["steps"]]
    for step, whole in zip(steps, case["steps"], strict=True):
        if step["active"] and step["h"] is None:  # warming up: offered, not taken
            step["h"] = observation(case["config"]["gate"]["statistic"], whole)
    return {**about, "gate": case["config"]["gate"], "steps": steps, "z_tolerance": 1e-9}


def observation(statistic: str, step: dict[str, Any]) -> float | None:
    """What a gate with this statistic would observe in an active step."""
    grads = [from_wire(answer["grads"]) for answer in step["answers"]]
    match statistic:
        case "corrective_norm":
            return global_norm(grads[2])
        case "initial_norm":
            return global_norm(grads[0])
        case "disagreement":
            return 1.0 - abs(cosine(grads[0], grads[2]))
    return step.get("statistic")  # "supplied"; none for "never"


def flags(case: Case) -> list[str]:
    """What a port must be able to do, and what happens, in words to select cases by."""
    settings, steps, simplest = case["config"], case["steps"], config()["gate"]
    outcomes = {"single": "single pass", "rolled back": "rollback", "skipped": "skipped", "raised": "exception"}
    found = {
        settings["estimator"]: True,
        settings["optimizer"]["name"]: True,
        settings["optimizer_state"]: True,
        settings["gate"]["statistic"]: True,
        "momentum": bool(settings["optimizer"].get("momentum")),
        "weight decay": bool(settings["optimizer"]["weight_decay"]),
        "clipping": settings["max_grad_norm"] is not None,
        "odd horizon": settings["horizon"] % 2 == 1,
        "several tensors": len(case["params"]) > 1,
        "ema": settings["gate"]["baseline"] == "ema",
        "trips": any(step.get("gate", {}).get("trips") for step in steps),
        "resumed": any(step.get("resume") for step in steps),
        "non-finite loss": any(step.get("why", "").startswith("non-finite loss") for step in steps),
        "beyond float32": any(too_large(answer.get("grads", {})) for step in steps for answer in step["answers"]),
        "interrupt": any(answer.get("raise") == INTERRUPT for step in steps for answer in step["answers"]),
        **{name: any(step["outcome"] == outcome for step in steps) for outcome, name in outcomes.items()},
        **{name: settings["gate"][name] != simplest[name] for name in everything()["gate_options"]},
    }
    return [name for name, present in found.items() if present]


def too_large(grads: dict[str, Any]) -> bool:
    """Whether a finite number is none in float32."""
    with np.errstate(over="ignore"):
        return any(np.isinf(g.astype(np.float32)[np.isfinite(g)]).any() for g in from_wire(grads).values())


# ---- Awkward runs ----------------------------------------------------------------------------------------------------


def run_cases(clause: str) -> Iterator[Case]:
    """The awkward runs of a clause that a file can show, those of few numbers first."""
    harness = the_oracle()
    cost = {}
    for name, awkward in play.planned(clause):
        plan = play.named(name, harness).plan("float64")
        numbers = len(plan.steps) * sum(array.size for array in plan.start.values())
        if can_be_shown(awkward) and numbers <= HEAVY:
            cost[name] = max(numbers, LIGHT)
    for name in sorted(cost, key=lambda name: cost[name]):
        if (case := run_case(name)) is not None:
            yield case


# Parameters times steps: below the first no run is preferred to another, above the second none is taken, so that the
# file stays below 1.5 MB.
LIGHT, HEAVY = 100, 200


def can_be_shown(awkward: play.Awkward) -> bool:
    """Whether a file can: it knows no order of arrays, and nobody interrupts a port that reads one."""
    return not awkward.untidy and not any(event.odd == "interrupt" for event in awkward.events)


def run_case(name: str) -> Case | None:
    """The awkward run of that name as whole steps; None where there is none that can be shown."""
    harness, clause = the_oracle(), name.partition("#")[0]
    try:
        awkward = play.named(name, harness)
        run = play.play(harness, awkward)
    except (ValueError, CaseError):
        return None
    case = described(clause, play.told(awkward), run.talk, awkward=name)
    return None if has_two_right_answers(case) else case


# ---- q and r ---------------------------------------------------------------------------------------------------------


SCALES = {  # clause -> (horizons, ratios)
    "EXT-01": ((2, 4, 6, 10), (0.5, 0.75, 1.03125, -0.5, 0.25, 0.9375, 0.0, -0.75, 2.0)),
    "EXT-02": ((3, 5, 7), (0.5, 0.75, 1.03125, -0.5, 0.25, 0.9375, 0.0, -0.25, 2.0)),
    "EXT-03": ((3, 4, 5, 10), (1.0, 1.0 + 2.0**-7, 1.0 - 2.0**-7, 1.0 + 2.0**-26, 1.0 - 2.0**-40)),
    "EXT-04": ((3, 4, 5, 10), (3.0, 2.5, 1.5, -2.0, -1.5, -0.875)),
    "EXT-05": ((3, 4, 5, 10), (-1.0, -1.0 + 2.0**-6, -1.0 - 2.0**-6, -0.875)),
}


def scale_cases() -> list[Case]:
    made = []
    for clause, (horizons, ratios) in SCALES.items():
        for horizon in horizons:
            among = [r for r in ratios if horizon % 2 or r != -1.0]  # with an even K two answers are right there
            q = extrapolation_scale(np.array(among), horizon)
            about = {"clause": clause, "comment": f"q at K = {horizon}"}
            values = {"horizon": horizon, "r": among, "q": q.tolist(), "tolerance": digits(16 * U * q)}
            made.append({**about, "flags": ["odd horizon"] if horizon % 2 else [], **values})
    return made


RATIOS: list[tuple[str, str, list[float], list[float], float | None]] = [  # clause, comment, g0, g1, C
    ("EST-01", "coordinate by coordinate", [1.0, -1.0, 2.0, 0.5], [0.5, -0.75, 2.25, -0.25], None),
    ("EST-02", "both gradients zero in a coordinate", [1.0, 0.0, 2.0], [0.5, 0.0, 1.0], None),
    ("EST-02", "below and above 1e-3 of the RMS", [1.0, 0.0005, 0.00125, -1.0], [1.0, 1.0, 0.001, -0.5], None),
    ("EST-02", "RMS, not mean magnitude", [1.0, 0.0003] + [2.0**-10] * 14, [1.0] * 16, None),
    ("EXT-04", "clamped to [-2, 3]", [1.0, 1.0, -1.0, 1.0], [40.0, -40.0, 2.9, 1.0], None),
    ("CLP-02", "clipped both: the norms' change is gone", [1.2, 1.6], [0.9, 1.2], 1.0),
    ("CLP-02", "only the second one clipped", [0.45, 0.6], [1.2, 1.6], 1.0),
]
RATIO_HORIZON = 5


def ratio_cases() -> list[Case]:
    made = []
    for clause, comment, g0, g1, limit in RATIOS:
        c0, c1 = (min(1.0, (limit or math.inf) / (float(np.linalg.norm(g)) + 1e-6)) for g in (g0, g1))
        r, takes_part = retention_ratio(c0 * np.array(g0), c1 * np.array(g1))
        q = np.where(takes_part, extrapolation_scale(r, RATIO_HORIZON), 1.0)
        about = {"clause": clause, "comment": comment, "flags": ["clipping"] if limit else []}
        values = {"horizon": RATIO_HORIZON, "g0": g0, "g1": g1, "c0": c0, "c1": c1}
        found = {"r": r.tolist(), "takes_part": takes_part.tolist(), "q": q.tolist(), "tolerance": digits(64 * U * q)}
        made.append({**about, **values, **found})
    return made


def digits(tolerance: np.ndarray) -> list[float]:
    return [float(f"{v:.3g}") for v in tolerance]
