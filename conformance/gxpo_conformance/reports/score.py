"""A run by groups of clauses, for whoever wants a score and not a verdict."""

from __future__ import annotations

from dataclasses import dataclass

from gxpo_conformance.clauses.table import GROUPS, clauses
from gxpo_conformance.reports.record import Record
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, KNOWN, NOT_RUN, PASS, UNDECLARED, VERDICTS

# What is said beside "4 of 5 clauses pass", in this order, one and several.
APART = {
    FAIL: ("fails", "fail"),
    ERROR: ("passes, though it is listed as known to fail", "pass, though they are listed as known to fail"),
    KNOWN: ("is known to fail", "are known to fail"),
    BLOCKED: ("is blocked", "are blocked"),
    NOT_RUN: ("did not run", "did not run"),
    UNDECLARED: ("is an option that the port does not declare", "are options that the port does not declare"),
}


@dataclass(frozen=True)
class Score:
    """Of some clauses. An option that the port does not declare is no part of `all`: nothing is asked of it."""

    name: str
    about: str
    clauses: dict[str, list[str]]  # verdict -> the clauses that came out so

    @property
    def passed(self) -> int:
        return len(self.clauses[PASS])

    @property
    def all(self) -> int:
        return sum(map(len, self.clauses.values())) - len(self.clauses[UNDECLARED])

    @property
    def words(self) -> str:
        """ "4 of 5 clauses pass; 1 fails: EST-02; 5 are options that the port does not declare" """
        some = self.clauses
        parts = [f"{self.passed} of {self.all} clause{'s' * (self.all != 1)} pass{'es' * (self.all == 1)}"]
        if not self.all:
            parts = ["nothing to pass"]
        for verdict, (one, several) in APART.items():
            if n := len(some[verdict]):
                which = "" if verdict == UNDECLARED else f": {', '.join(some[verdict])}"
                parts.append(f"{n} {one if n == 1 else several}{which}")
        return "; ".join(parts)


def verdicts(records: list[Record]) -> dict[str, str]:
    """Each clause that the run looked at: the worst of its dtypes."""
    found: dict[str, set[str]] = {}
    for r in records:
        if r["record"] == "result":
            found.setdefault(r["clause"], set()).add(r["verdict"])
    return {c: next(v for v in VERDICTS if v in some) for c, some in found.items()}


def scores(records: list[Record]) -> list[Score]:
    """By group, of the clauses that --only asked for; what they lean on is not among them."""
    only, found = tuple(records[0].get("only", ())), verdicts(records)
    asked = [c for c in clauses() if not only or c.startswith(only)]
    return [
        of(group, about, some, found)
        for group, about in GROUPS.items()
        if (some := [c for c in asked if c.startswith(group)])
    ]


def of(name: str, about: str, some: list[str], found: dict[str, str]) -> Score:
    return Score(name, about, {v: [c for c in some if found.get(c, NOT_RUN) == v] for v in VERDICTS})


def total(some: list[Score]) -> Score:
    return Score("all", "", {v: [c for s in some for c in s.clauses[v]] for v in VERDICTS})


def score_lines(records: list[Record]) -> list[str]:
    """What the terminal says where --only chose clauses: a line a group, then all; nothing where all ran."""
    if not records[0].get("only"):
        return []
    some = scores(records)
    lines = [f"{s.name}  {s.words}" for s in some]
    if len(some) > 1:
        everything = total(some)
        percent = f" ({100 * everything.passed // everything.all} %)" if everything.all else ""
        lines.append(f"all  {everything.passed} of {everything.all} clauses pass{percent}")
    return lines


def likely(r: Record) -> list[str]:
    """What a failing result looks like, a line each: known mistakes, and whatever else is recognised."""
    hint = [r["hint"]] if r.get("hint") else []
    return hint + [f"{n['how']}: {n['does']} ({n['id']})" for n in candidates(r)]


def candidates(r: Record) -> list[Record]:
    """The known mistakes that a failing result looks like. `candidates` has all, `nearest` the first; older records
    have the second alone."""
    return r.get("candidates") or ([r["nearest"]] if r.get("nearest") else [])
