"""The run as Gradescope's autograder reads it: results.json, with points for each clause.

The format: https://gradescope-autograders.readthedocs.io/en/latest/specs/. All texts go there as plain text, for a port
may have written them; what the command prints stays hidden from students, for it tells of hidden clauses as well.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from gxpo_conformance import outputs
from gxpo_conformance.clauses.table import GROUPS, SPEC_VERSION, clauses
from gxpo_conformance.points import Points
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.reports.record import Record, legible
from gxpo_conformance.reports.score import likely
from gxpo_conformance.trial import BLOCKED, PASS

MOST_TOLD = 2000  # characters of one test's output; a port may say a megabyte
UNFINISHED = (
    "The suite did not come to an end: the submission ended its process, or it ran out of time or memory. A submission "
    "must not call exit, and every request to it must be answered."
)
BROKE = "The submission could not be judged, so that nothing is marked."


def gradescope(records: list[Record], points: Points) -> str:
    """results.json of one run. A clause earns its points when it passes in every dtype that ran and can show it."""
    head, *_, foot = records
    tests = [test(c, points, records) for c in points.worth]
    earned = sum(t["status"] == "passed" for t in tests)
    shown = [t for t in tests if t["visibility"] == "visible"]
    lines = [f"{head['port']} in {', '.join(head['dtypes'])}, by the GXPO specification {SPEC_VERSION}."]
    lines.append(f"{sum(t['status'] == 'passed' for t in shown)} of {len(shown)} clauses earn their points.")
    if len(shown) < len(tests):
        lines.append(f"{len(tests) - len(shown)} more clauses are marked and shown later.")
    about = {"port": head["port"], "verdict": foot["words"], **head["versions"], "clauses": [earned, len(tests)]}
    made = results(score(records, points), "\n".join(lines), tests, foot["seconds"])
    return as_json({**made, "extra_data": about})


def unjudged(message: str, points: Points) -> str:
    """results.json of a run without a verdict: no points, and why."""
    named = {"name": "The suite runs to its end", "score": 0.0, "max_score": rounded(points.all), "status": "failed"}
    return as_json(results(0.0, message, [{**named, "output": message, "visibility": "visible"}]))


def results(score: float, output: str, tests: list[dict[str, Any]], seconds: float = 0.0) -> dict[str, Any]:
    return {
        "score": score,
        "execution_time": round(seconds),
        "output": legible(output, MOST_TOLD),
        "output_format": "text",
        "test_output_format": "text",
        "test_name_format": "text",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def test(clause: str, points: Points, records: list[Record]) -> dict[str, Any]:
    found, worth = of(clause, records), rounded(points.worth[clause])
    passed = earns(found)
    group = [c for c in clauses() if c.startswith(clause[:3])]
    return {
        "name": f"{clause} {clauses()[clause].rule}",
        "number": f"{list(GROUPS).index(clause[:3]) + 1}.{group.index(clause) + 1}",
        "score": worth if passed else 0.0,
        "max_score": worth,
        "status": "passed" if passed else "failed",
        "output": legible("\n\n".join(told(r, points, records) for r in found), MOST_TOLD)
        or "not run: the run ended before it",
        "visibility": points.visibility if clause in points.hidden else "visible",
        "tags": [clause[:3], clauses()[clause].level],
    }


def of(clause: str, records: list[Record]) -> list[Record]:
    return [r for r in records if r.get("clause") == clause]


def earns(found: list[Record]) -> bool:
    return bool(found) and all(r["verdict"] == PASS for r in found)


def told(r: Record, points: Points, records: list[Record]) -> str:
    """One result, with what it leans on where that is in its way: that clause may be no test of this exercise."""
    dtype = f"{r['dtype']}: " if r["dtype"] else ""
    said = "\n".join([f"{dtype}{r['verdict']}", *r["message"].splitlines(), *likely(r)])
    lean = re.match(r"leans on (\w{3}-\d\d)", r["message"])
    if r["verdict"] != BLOCKED or not lean or lean[1] in points.hidden:
        return said
    return "\n".join(
        [said, *(f"{lean[1]}, {told(x, points, records)}" for x in of(lean[1], records) if x["dtype"] == r["dtype"])]
    )


def score(records: list[Record], points: Points) -> float:
    return rounded(math.fsum(worth for clause, worth in points.worth.items() if earns(of(clause, records))))


def rounded(points: float) -> float:
    return round(points, 4)


def as_json(made: dict[str, Any]) -> str:
    return json.dumps(made, indent=1, allow_nan=False) + "\n"


class Marking:
    """Writes results whatever happens to the run: no points before it begins, for a port may end the process."""

    def __init__(self, path: str | None, points: Points) -> None:
        self.path, self.points = path, points

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Around all that touches the port."""
        self.write(unjudged(UNFINISHED, self.points))
        try:
            yield
        except BaseException as error:  # a port may raise SystemExit as well
            said = str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
            self.write(unjudged(f"{BROKE} {said}", self.points))
            raise

    def settle(self, records: list[Record]) -> int:
        """Write the marks and say them; the exit status: 0 every point was earned, 1 not every."""
        self.write(gradescope(records, self.points))
        earned, most = score(records, self.points), rounded(self.points.all)
        print(f"marks: {earned:g} of {most:g} points")
        return 0 if all(earns(of(c, records)) for c in self.points.worth) else 1

    def write(self, text: str) -> None:
        if self.path:
            outputs.write("--gradescope", self.path, text)
