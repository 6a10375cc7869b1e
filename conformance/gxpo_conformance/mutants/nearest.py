"""Which known mistake a failing port looks like: the mutants of the suite, put through the same check."""

from __future__ import annotations

import functools
import json
import math
import time
from importlib import resources
from typing import Any

from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.harness.findings import Finding
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import MUTANTS, Mutant
from gxpo_conformance.protocol import everything
from gxpo_conformance.trial import FAIL, Result, Verdict, attempt

TIME = 5.0  # seconds that the search may take in all


@functools.cache
def matrix_file() -> dict[str, Any]:
    """The published matrix, as `gxpo-conformance selftest --json` wrote it."""
    text = resources.files("gxpo_conformance").joinpath("mutants", "matrix.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def matrix() -> dict[str, dict[str, list[str]]]:
    """Of it, mutant -> dtype -> clauses that reject it."""
    return {m["id"]: m["kills"] for m in matrix_file()["mutants"]}


class Nearest:
    """Looks up the failures of one verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.spent = 0.0

    def of(self, result: Result) -> Mutant | None:
        """The mutant that fails this clause at the same place with the same number; of several, the one that fails
        most nearly the same clauses. None where there is none, or the time is up."""
        if result.finding is None or result.finding.crash or result.clause.id.startswith("TOY"):
            return None
        failed = {r.clause.id for r in self.verdict.every() if r.verdict == FAIL and r.dtype == result.dtype}

        def likeness(mutant: Mutant) -> float:
            kills = set(matrix().get(mutant.id, {}).get(result.dtype, ()))
            return len(kills & failed) / max(1, len(kills | failed))

        likely = [m for m in MUTANTS.values() if result.clause.id in matrix().get(m.id, {}).get(result.dtype, ())]
        for mutant in sorted(likely, key=likeness, reverse=True):
            if self.spent > TIME:
                break
            began = time.perf_counter()
            harness = Harness(mutant.port(), everything(), result.dtype, "cpu")
            failure = attempt(result.clause.id, harness)
            self.spent += time.perf_counter() - began
            if failure is not None and alike(failure.finding, result.finding):
                return mutant
        return None


def how(finding: Finding) -> str:
    """How sure that is: equal numbers tell a mistake, equal counts only one that shows the same."""
    return "looks like a known mistake" if finding.budgets is None else "matches a known mistake"


def alike(one: Finding, other: Finding) -> bool:
    """The same place, and the same number within what rounding allows."""
    if (one.step, one.phase, one.tensor, one.coordinate) != (other.step, other.phase, other.tensor, other.coordinate):
        return False
    if one.got is None or other.got is None or other.wanted is None or one.budgets is None or other.budgets is None:
        return (one.got, one.text) == (other.got, other.text)
    if one.got == other.got or (math.isnan(one.got) and math.isnan(other.got)):
        return True
    unit = abs(other.got - other.wanted) / other.budgets  # one rounding budget
    return abs(one.got - other.got) <= 2 * ALLOWED * unit
