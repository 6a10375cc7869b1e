"""The vectors: the suite's cases as files, for those who can run neither an adapter nor a process.

Four kinds, a file each: `scale` (r, K -> q), `ratio` (g0, g1, c0, c1 -> r, q), `step` (configuration, parameters,
gradients -> points asked, end), `gate` (configuration, observations -> z, active). `step` and `gate` cases are the
suite's own, as its checks play them; all are written by the oracle in float64. An id stands for one case for good: a
case whose input changes gets a new one, and the old one is retired.
"""

from __future__ import annotations

import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.clauses.table import CHECKS, SPEC_VERSION, clauses
from gxpo_conformance.harness.budget import ALLOWED, UNIT_ROUNDOFF
from gxpo_conformance.harness.case import Case, as_case, replay
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import LEAST_MARGIN, MUTANTS, Mutant
from gxpo_conformance.protocol import AdapterError, config, everything
from gxpo_conformance.trial import attempt
from gxpo_reference.oracle import extrapolation_scale, retention_ratio

FOLDER = Path(str(resources.files("gxpo_conformance").joinpath("vectors")))
KINDS = ("scale", "ratio", "step", "gate")
EXACT = "exact"  # a margin in counts, not in rounding: nothing comes near
U = UNIT_ROUNDOFF["float64"]
ABOUT_THE_STEP = ("GAT-07", "GAT-08", "GAT-20", "GAT-21", "GAT-22")  # what is observed, not how it is scored
ABOUT_SEVERAL_RUNS = ("INV-05", "INV-06", "INV-07", "INV-08", "INV-09", "INV-10")  # one run shows nothing of them
INPUTS = {  # what makes a case the case it is
    "scale": ("clause", "horizon", "r"),
    "ratio": ("clause", "horizon", "g0", "g1", "c0", "c1"),
    "step": ("clause", "config", "params", "answers", "resume"),
    "gate": ("clause", "gate", "h"),
}


# ---- What the oracle says --------------------------------------------------------------------------------------------


def make() -> dict[str, list[Case]]:
    """Every case of every kind, without ids and margins."""
    runs = played()
    return {
        "scale": scale_cases(),
        "ratio": ratio_cases(),
        "step": [case for case in runs if kind_of(case) == "step"],
        "gate": [gate_only(case) for case in runs if kind_of(case) == "gate"],
    }


def kind_of(case: Case) -> str:
    clause = case["clause"]
    return "gate" if clause.startswith("GAT") and clause not in ABOUT_THE_STEP else "step"


def played() -> list[Case]:
    """The runs of every scripted check, played with the oracle as the port, as whole steps."""
    made: list[Case] = []
    for clause in clauses():
        check = CHECKS[clause]
        if clause.startswith("TOY") or clause in ABOUT_SEVERAL_RUNS or "float64" not in check.dtypes:
            continue
        harness = Harness(oracle_adapter.Port(), everything(), "float64", "cpu")
        if failure := attempt(clause, harness):
            raise failure
        runs: list[Case] = []
        for talk in harness.talks:
            case = as_case(talk)
            if talk.steps and case not in runs:
                runs.append(case)
        comment = check.function.__name__.replace("_", " ")
        made += [{"clause": clause, "comment": comment, "flags": flags(case), **case} for case in runs]
    return made


def gate_only(case: Case) -> Case:
    """What a gate on its own has to be told, and to say."""
    about = {key: case[key] for key in ("clause", "comment", "flags")}
    steps = [{k: v for k, v in step["gate"].items() if k != "streak"} for step in case["steps"]]
    for step, whole in zip(steps, case["steps"], strict=True):
        if step["active"] and step["h"] is None:  # warming up: offered, not taken
            step["h"] = float(np.abs(whole["answers"][2]["grads"]["w"]["data"]).max())
    return {**about, "gate": case["config"]["gate"], "steps": steps, "z_tolerance": 1e-9}


def flags(case: Case) -> list[str]:
    """What a port must be able to do, and what happens, in words to select cases by."""
    config, steps = case["config"], case["steps"]
    outcomes = {"single": "single pass", "rolled back": "rollback", "skipped": "skipped", "raised": "exception"}
    found = {
        config["estimator"]: True,
        config["optimizer"]["name"]: True,
        config["optimizer_state"]: True,
        "momentum": bool(config["optimizer"].get("momentum")),
        "weight decay": bool(config["optimizer"]["weight_decay"]),
        "clipping": config["max_grad_norm"] is not None,
        "odd horizon": config["horizon"] % 2 == 1,
        "several tensors": len(case["params"]) > 1,
        "ema": config["gate"]["baseline"] == "ema",
        "trips": any(step.get("gate", {}).get("trips") for step in steps),
        "resumed": any(step.get("resume") for step in steps),
        **{name: any(step["outcome"] == outcome for step in steps) for outcome, name in outcomes.items()},
        **{name: config["gate"][name] not in (None, False, 0) for name in ("two_sided", "warmup", "cooldown")},
        "patience": config["gate"]["patience"] > 1,
        "max_active_steps": config["gate"]["max_active_steps"] is not None,
    }
    return [name for name, present in found.items() if present]


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
            q = extrapolation_scale(np.array(ratios), horizon)
            about = {"clause": clause, "comment": f"q at K = {horizon}"}
            values = {"horizon": horizon, "r": list(ratios), "q": q.tolist(), "tolerance": digits(16 * U * q)}
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


# ---- Margins: how many tolerances away the nearest wrong implementation is ------------------------------------------


def margins(kind: str, cases: list[Case]) -> list[str]:
    """Writes "margin" and "nearest" into every case; returns what is wrong with them."""
    wrong: list[str] = []
    whole = [case for case in played() if kind_of(case) == kind] if kind in ("step", "gate") else cases
    for case, run in zip(cases, whole, strict=True):
        about = [m for m in MUTANTS.values() if case["clause"] in m.clauses]
        others = [m for m in MUTANTS.values() if m not in about and (kind != "gate" or about_the_gate(m))]
        away = distances(kind, run, about) or distances(kind, run, others)
        nearest = min(away, key=lambda m: away[m], default=None)
        margin = 0.0 if nearest is None else away[nearest]
        if margin < LEAST_MARGIN:
            what = (
                f"{nearest} is {margin:.3g} tolerances away, {LEAST_MARGIN:g} needed"
                if nearest
                else "rejects no mutant"
            )
            wrong.append(f"{kind}, {case['clause']}, {case['comment']}: {what}")
        case["margin"] = EXACT if math.isinf(margin) else float(f"{margin:.3g}")
        case["nearest"] = nearest
    return wrong


def about_the_gate(mutant: Mutant) -> bool:
    return any(clause.startswith("GAT") for clause in mutant.clauses)


def distances(kind: str, case: Case, mutants: list[Mutant]) -> dict[str, float]:
    """Mutant -> how many tolerances it is off, for each that this case rejects."""
    distance = {"scale": scale_distance, "ratio": ratio_distance, "gate": gate_distance}.get(kind, run_distance)
    found = {mutant.id: distance(case, mutant) for mutant in mutants}
    return {name: off for name, off in found.items() if off > 1}


def run_distance(case: Case, mutant: Mutant) -> float:
    try:
        return replay(Harness(mutant.port(), everything(), "float64", "cpu"), case)
    except Failure as failure:
        finding = failure.finding
        return 0.0 if finding.crash else math.inf if finding.budgets is None else finding.budgets / ALLOWED


def gate_distance(case: Case, mutant: Mutant) -> float:
    """What differs in anything but counts is not the gate."""
    off = run_distance(case, mutant)
    return off if math.isinf(off) else 0.0


def scale_distance(case: Case, mutant: Mutant) -> float:
    session = mutant.kind({"w": np.zeros(1)}, config(horizon=case["horizon"]), "float64")
    with np.errstate(all="ignore"):
        return furthest(session.scale(np.array(case["r"]), case["horizon"]), case["q"], case["tolerance"])


def ratio_distance(case: Case, mutant: Mutant) -> float:
    """As a step from 0 with plain SGD and alpha = 1, where theta~ is q theta2."""
    g0, g1 = (np.array(case[key]) for key in ("g0", "g1"))
    limit = 1.0 if "clipping" in case["flags"] else None
    harness = Harness(mutant.port(), everything(), "float64", "cpu")
    talk = harness.talk({"w": np.zeros(g0.shape)}, config(horizon=case["horizon"], max_grad_norm=limit))
    asked = talk.step([{"w": g0}, {"w": g1}, {"w": g0}]).asked
    theta2 = -0.125 * (case["c0"] * g0 + case["c1"] * g1)
    if len(asked) < 3:
        return 0.0
    with np.errstate(all="ignore"):
        q = np.where(theta2 == 0, case["q"], asked[2]["w"] / theta2)
    return furthest(q, case["q"], case["tolerance"])


def furthest(got: np.ndarray, want: list[float], tolerance: list[float]) -> float:
    off = np.abs(np.broadcast_to(got, np.shape(want)) - want) / tolerance
    return float(np.nan_to_num(off, nan=np.inf).max())


# ---- The files -------------------------------------------------------------------------------------------------------


def load(kind: str) -> list[Case]:
    return read(kind)["cases"]


def read(kind: str) -> dict[str, Any]:
    """A file; one without cases where there is none yet."""
    path = FOLDER / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": [], "retired": []}


def text(kind: str, cases: list[Case], retired: list[str]) -> str:
    """A file: a case a line, so that a change shows as the lines it changes."""
    head = {"$schema": f"{kind}.schema.json", "kind": kind, "spec": SPEC_VERSION, "dtype": "float64"}
    lines = ",\n".join(json.dumps(case, separators=(",", ":"), allow_nan=False) for case in cases)
    return json.dumps({**head, "retired": retired})[:-1] + ', "cases": [\n' + lines + "\n]}\n"


def inputs(kind: str, case: Case) -> str:
    """What is put into a case, as text; numbers to twelve digits, for the last ones are the machine's."""
    steps = case.get("steps", [])
    given = {**case, "h": [s.get("h") for s in steps], "answers": [s.get("answers") for s in steps]}
    given["resume"] = [s.get("resume", False) for s in steps]
    return json.dumps(to_digits({key: given[key] for key in INPUTS[kind]}, 12), sort_keys=True)


def to_digits(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {k: to_digits(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [to_digits(v, digits) for v in value]
    return float(f"{value:.{digits - 1}e}") if isinstance(value, float) else value


def numbered(kind: str, cases: list[Case], file: dict[str, Any]) -> tuple[list[Case], list[str]]:
    """(cases with their ids, retired ids): a case that the file has keeps its id, a new one gets the next number."""
    known = {inputs(kind, case): case["id"] for case in file["cases"]}
    taken = [*known.values(), *file["retired"]]
    made, kept = [], set()
    for case in cases:
        name = known.get(inputs(kind, case))
        if name is None:
            prefix = case["clause"] if kind in ("step", "gate") else f"{kind}/{case['clause']}"
            numbers = [int(found[1]) for t in taken if (found := re.fullmatch(rf"{re.escape(prefix)}/(\d+)", t))]
            name = f"{prefix}/{max(numbers, default=0) + 1}"
            taken.append(name)
        kept.add(name)
        made.append({"id": name, **case})
    return made, sorted({*file["retired"], *(set(known.values()) - kept)})


def write(folder: str) -> int:
    """Write every file into `folder`; 1 where a case is not fit to be one. AdapterError where it cannot be written."""
    wrong: list[str] = []
    for kind, cases in make().items():
        wrong += margins(kind, cases)
        file = read(kind)
        made, retired = numbered(kind, cases, file)
        new = {case["id"] for case in made} - {case["id"] for case in file["cases"]}
        gone = set(retired) - set(file["retired"])
        print(f"{kind}: {len(made)} cases, {len(new)} new, {len(gone)} retired", flush=True)
        if not wrong:
            try:
                Path(folder, f"{kind}.json").write_text(text(kind, made, retired), encoding="utf-8")
            except OSError as error:
                raise AdapterError(f"--write {folder}: {error}") from error
    for line in wrong:
        print(f"UNFIT  {line}")
    return 1 if wrong else 0


def check() -> int:
    """Compare the files with what the oracle gives, case by case; 1 where they differ."""
    total = 0
    for kind, cases in make().items():
        file = read(kind)
        made, retired = numbered(kind, cases, file)
        wrong = differences(made, file["cases"]) + [f"{name} is not made any more" for name in retired]
        wrong = [line for line in wrong if line.split()[0] not in file["retired"]]
        wrong += [f"{case['id']}: margin {case['margin']}" for case in file["cases"] if unfit(case["margin"])]
        for line in wrong:
            print(f"{kind}: {line}")
        print(f"{kind}: {len(file['cases'])} cases, {len(wrong)} differ from the oracle")
        total += len(wrong)
    return 1 if total else 0


def unfit(margin: float | str) -> bool:
    return margin != EXACT and not (isinstance(margin, float | int) and margin >= LEAST_MARGIN)


def differences(made: list[Case], files: list[Case]) -> list[str]:
    """A line for every case that the file lacks or has otherwise; numbers within a millionth of a millionth."""
    there = {case["id"]: case for case in files}
    wrong = []
    for case in made:
        if case["id"] not in there:
            wrong.append(f"{case['id']} is missing (vectors --write adds it)")
            continue
        stored = {k: v for k, v in there[case["id"]].items() if k not in ("margin", "nearest")}
        where = differs(case, stored)
        if where is not None:
            wrong.append(f"{case['id']}{where}")
    return wrong


def differs(one: Any, other: Any, where: str = "") -> str | None:
    """Where two trees of JSON part; None where they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where} has {sorted(one.keys() ^ other.keys())} on one side only"
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where} has {len(other)} entries, should be {len(one)}"
        pairs = [(a, b, f"{where}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float | int):
        # Tolerances are written with three digits, whose last may turn with the machine.
        near = 1e-2 if "tolerance" in where else 1e-12
        return None if math.isclose(one, other, rel_tol=near, abs_tol=1e-15) else f"{where} is {other}, should be {one}"
    else:
        return None if one == other else f"{where} is {other!r}, should be {one!r}"
    return next((found for pair in pairs if (found := differs(*pair)) is not None), None)
