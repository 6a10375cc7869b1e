"""Margins: how many tolerances away from a case the nearest wrong implementation is."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.harness.case import Case, replay
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import LEAST_MARGIN, MUTANTS, Mutant
from gxpo_conformance.protocol import config, everything
from gxpo_conformance.runs.play import has_runs
from gxpo_conformance.vectors.cases import WHOLE_RUNS, played, run_cases

EXACT = "exact"  # a margin in counts, not in rounding: nothing comes near
RUNS = 2  # of a clause


def margins(kind: str, cases: list[Case]) -> list[str]:
    """Writes "margin" and "nearest" into every case; returns what is wrong with them."""
    wrong: list[str] = []
    whole = played()[kind] if kind in ("step", "gate") else cases
    for case, run in zip(cases, whole, strict=True):
        about = [m for m in MUTANTS.values() if case["clause"] in m.clauses]
        others = [m for m in MUTANTS.values() if m not in about and (kind != "gate" or about_the_gate(m))]
        away = distances(kind, run, about) or distances(kind, run, others)
        if not mark(case, away):
            least = f"{case['nearest']} is {case['margin']} tolerances away, {LEAST_MARGIN:g} needed"
            what = least if away else "rejects no mutant"
            wrong.append(f"{kind}, {case['clause']}, {case['comment']}: {what}")
    return wrong


def fit_runs() -> tuple[list[Case], int]:
    """(the first RUNS awkward runs of each clause that a known mistake about it is far from, how many were left out
    because none is)."""
    made: list[Case] = []
    unfit = 0
    for clause in clauses():
        if clause.startswith(WHOLE_RUNS) or not has_runs(clause):
            continue
        about, found = [m for m in MUTANTS.values() if clause in m.clauses], 0
        for case in run_cases(clause):
            if mark(case, distances("run", case, about)):
                made.append(case)
                found += 1
            else:
                unfit += 1
            if found == RUNS:
                break
    return made, unfit


def mark(case: Case, away: dict[str, float]) -> bool:
    """Writes "margin" and "nearest" into a case: whether it is far enough from what it rejects."""
    nearest = min(away, key=lambda m: away[m], default=None)
    margin = 0.0 if nearest is None else away[nearest]
    case["margin"] = EXACT if math.isinf(margin) else float(f"{margin:.3g}")
    case["nearest"] = nearest
    return margin >= LEAST_MARGIN


def unfit(margin: Any) -> bool:
    return margin != EXACT and not (isinstance(margin, float | int) and margin >= LEAST_MARGIN)


def about_the_gate(mutant: Mutant) -> bool:
    return any(clause.startswith("GAT") for clause in mutant.clauses)


def distances(kind: str, case: Case, mutants: list[Mutant]) -> dict[str, float]:
    """Mutant -> how many tolerances it is off, for each that this case rejects."""
    distance = {"scale": scale_distance, "ratio": ratio_distance, "gate": gate_distance}.get(kind, run_distance)
    found = {mutant.id: distance(case, mutant) for mutant in mutants}
    return {name: off for name, off in found.items() if off > 1}


def run_distance(case: Case, mutant: Mutant) -> float:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a mean of nothing, in a wrong implementation
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
