"""Which known mistake a failing port looks like: the mutants of the suite, put through the same checks.

Decided for a whole run, not clause by clause: many mistakes show the same first number in one clause, few do in all.
A mistake is compared by everything that a failing check saw: the place and the number that differ, how many gradients
each step asked for, and every point that was asked. What fits badly is not named: a wrong name costs more than none.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from gxpo_conformance.clauses.table import CHECKS
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.harness.findings import CaseError, Finding
from gxpo_conformance.harness.harness import Dialogue, Harness
from gxpo_conformance.mutants import MUTANTS, Mutant
from gxpo_conformance.protocol import Arrays, everything
from gxpo_conformance.runs import play
from gxpo_conformance.trial import ERROR, FAIL, KNOWN, PASS, Result, Verdict, outcome_of

TIME = 5.0  # seconds that the search may take in all
LEAST_CERTAIN = (
    2  # clauses with equal numbers for "matches": of one clause alone several mistakes often share all of it
)
LEAST_UNLIKE = 3  # ... for a mistake that does not explain all, or is not all there
LEAST_COUNTS = 6  # clauses for a mistake that shows in counts alone, of which all must agree
LEAST_LIKENESS = 0.7
MOST_NAMED = 3  # mistakes that fit equally well; of more, none is named
MOST_MISTAKES = 3  # that are looked for in one run
NEAR = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}  # points asked, relative to the largest coordinate

Pair = tuple[str, str]  # a clause and a dtype


@functools.cache
def matrix_file() -> dict[str, Any]:
    """The published matrix, as `gxpo-conformance selftest --json` wrote it."""
    text = resources.files("gxpo_conformance").joinpath("mutants", "matrix.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def matrix() -> dict[str, dict[str, list[str]]]:
    """Of it, mutant -> dtype -> clauses that reject it."""
    return {m["id"]: m["kills"] for m in matrix_file()["mutants"]}


@functools.cache
def awkward_runs() -> dict[str, dict[str, dict[str, str]]]:
    """Of it, mutant -> dtype -> clause -> the awkward run that rejects it first, where no fixed case does."""
    return {m["id"]: m["runs"] for m in matrix_file()["mutants"] if "runs" in m}


# ---- What a check saw ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """How an implementation failed a check."""

    finding: Finding
    asked: list[list[Arrays]]  # of the session that failed: each step's points

    @property
    def numbers(self) -> bool:
        """Whether it is a number that is wrong, not only a count or a text."""
        return self.finding.budgets is not None


def seen(finding: Finding, talk: Dialogue | None) -> Seen:
    return Seen(finding, [list(step.asked) for step in talk.steps] if talk else [])


@functools.lru_cache(maxsize=8192)
def shown(mutant: str, clause: str, run: str | None, dtype: str, capabilities: str) -> Seen | None:
    """How a mutant fails the fixed cases of a clause, or one awkward run. `capabilities`: those that the port declared,
    as JSON, for a check may go by them. None where it passes."""
    harness = Harness(MUTANTS[mutant].port(), json.loads(capabilities), dtype, "cpu")
    try:
        failure = outcome_of(functools.partial(one_run, run) if run else CHECKS[clause].function, harness)
    except (CaseError, ValueError):  # it left the path that the case is fit for; there is no such run
        return None
    return seen(failure.finding, harness.latest) if failure else None


def one_run(name: str, harness: Harness) -> None:
    """Failure, of the smallest run like it, where the awkward run of that name fails."""
    awkward = play.named(name, harness)
    failure = play.attempt(harness, awkward)
    if failure is not None:
        raise play.shrunk(harness, awkward, failure)


def same(one: Seen, other: Seen, dtype: str) -> bool:
    """Whether `one` failed as `other` did, a mutant."""
    return alike(one.finding, other.finding, dtype) and same_points(one.asked, other.asked, NEAR[dtype])


def alike(one: Finding, other: Finding, dtype: str) -> bool:
    """The same place, and the same number within what rounding allows."""
    if (one.step, one.phase, one.tensor, one.coordinate) != (other.step, other.phase, other.tensor, other.coordinate):
        return False
    if one.phase == "gradients asked":
        return (one.got, one.wanted) == (other.got, other.wanted)
    if one.got is None or other.got is None or other.wanted is None or one.budgets is None or other.budgets is None:
        return (one.got, one.text) == (other.got, other.text)
    if one.got == other.got or (math.isnan(one.got) and math.isnan(other.got)):
        return True
    if math.isinf(other.budgets):  # it has to be exact, which the wrong number is not
        return abs(one.got - other.got) <= NEAR[dtype] * abs(other.got)
    unit = abs(other.got - other.wanted) / other.budgets  # one rounding budget
    return abs(one.got - other.got) <= 2 * ALLOWED * unit


def same_points(one: list[list[Arrays]], other: list[list[Arrays]], near: float) -> bool:
    """Whether both asked for as many gradients in every step, and at the same points, the failing step's too."""
    if [len(step) for step in one] != [len(step) for step in other]:
        return False
    points = [(a, b) for steps in zip(one, other, strict=True) for a, b in zip(*steps, strict=True)]
    return all(a.keys() == b.keys() and all(close(a[k], b[k], near) for k in a) for a, b in points)


def close(a: np.ndarray, b: np.ndarray, near: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    largest = np.abs(np.where(finite, b, 0.0)).max(initial=0.0)
    near_enough = np.abs(np.where(finite, a, 0.0) - np.where(finite, b, 0.0)) <= near * largest
    return bool(near_enough.all()) and np.array_equal(
        np.where(finite, 0.0, a), np.where(finite, 0.0, b), equal_nan=True
    )


# ---- What fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A mutant beside a run: which of its clauses fail here with its numbers, and how much of what fails that is."""

    mutant: Mutant
    likeness: float  # 1: everything that it fails fails here just so, and nothing else fails
    whole: bool  # everything that it fails fails here just so
    explains: frozenset[Pair]
    clauses: int  # of `explains`
    numbers: int  # of them, those with a number that is wrong

    @property
    def certain(self) -> bool:
        return self.likeness == 1 and self.numbers >= LEAST_CERTAIN

    @property
    def worth_naming(self) -> bool:
        if self.likeness == 1:
            return self.numbers > 0 or self.clauses >= LEAST_COUNTS
        return self.numbers >= LEAST_UNLIKE and (self.whole or self.likeness >= LEAST_LIKENESS)


@dataclass(frozen=True)
class Guess:
    """What a port seems to do. Several mutants: they fit equally well."""

    certain: bool
    mutants: tuple[Mutant, ...]
    explains: frozenset[Pair]  # the failures that it would account for

    @property
    def how(self) -> str:
        verb = "matches" if self.certain else "looks like"
        return f"{verb} {'a known mistake' if len(self.mutants) == 1 else 'one of these known mistakes'}"

    @property
    def words(self) -> str:
        return f"{self.how}: {'; or '.join(f'{m.does} ({m.id})' for m in self.mutants)}"


class Nearest:
    """Looks up the failures of one verdict. `without`: mutants that are not to be named."""

    def __init__(self, verdict: Verdict, without: Collection[str] = ()) -> None:
        self.verdict = verdict
        self.capabilities = json.dumps(verdict.capabilities, sort_keys=True)
        # A port that declares all is put to the very runs that the mutants were.
        declared = {**verdict.capabilities, "dtypes": None, "devices": None}
        self.declares_all = declared == {**everything(), "in process": True, "dtypes": None, "devices": None}
        self.without = frozenset(without)
        results = {(r.clause.id, r.dtype): r for r in verdict.every()}
        failed = {pair: r for pair, r in results.items() if r.verdict in (FAIL, KNOWN) and r.finding}
        self.ran = {pair for pair, r in results.items() if r.verdict in (PASS, ERROR)} | failed.keys()
        # bfloat16 shows too little to tell mistakes apart, and whole runs follow from the rest; where there is nothing
        # else, there is nothing to go by.
        self.judged = {(c, d) for c, d in self.ran if not c.startswith("TOY") and d != "bfloat16"}
        self.failed = {pair: r for pair, r in failed.items() if pair in self.judged}
        self.all_failed = failed.keys()

    def of(self, result: Result) -> Guess | None:
        """The guess that accounts for this failure."""
        return next((g for g in self.guesses if (result.clause.id, result.dtype) in g.explains), None)

    @functools.cached_property
    def guesses(self) -> list[Guess]:
        """One where one mistake accounts for everything; more where each accounts for a part; none where nothing
        fits, or the time is up."""
        self.end = time.perf_counter() + TIME
        found: list[Guess] = []
        left = set(self.failed)
        while left and len(found) < MOST_MISTAKES:
            fits = self.best(left, alone=not found)
            if not fits or len(fits) > MOST_NAMED:
                break
            explained = frozenset.union(*(f.explains for f in fits))
            beside = {pair for f in fits for pair in self.kills(f.mutant) & (self.all_failed - self.judged)}
            guess = Guess(all(f.certain for f in fits), tuple(f.mutant for f in fits), explained | beside)
            found.append(guess)
            left -= explained
        return found

    def kills(self, mutant: Mutant) -> set[Pair]:
        return {(c, d) for d, by in matrix().get(mutant.id, {}).items() for c in by}

    def best(self, left: set[Pair], alone: bool) -> list[Fit]:
        """The fits that are worth naming and that none beats, of failures that are `left`. `alone`: nothing else has
        been found; else a mistake must be there whole."""
        kept: list[Fit] = []
        for mutant, kills, bound in self.likely(left):
            if time.perf_counter() > self.end or (kept and bound < kept[0].likeness):
                break  # no later one can be better
            least = kept[0].likeness if kept else 0.0
            fit = self.fit(mutant, kills, left, least)
            if fit is None or not fit.worth_naming or not (alone or fit.whole) or fit.likeness < least:
                continue
            kept = [f for f in kept if f.likeness == fit.likeness] + [fit]
        return kept

    def likely(self, left: set[Pair]) -> Iterable[tuple[Mutant, set[Pair], float]]:
        """(mutant, what it fails of what ran, the most likeness that it can have), the most likely first."""
        found = []
        for mutant in MUTANTS.values():
            kills = self.kills(mutant) & self.judged
            shared = kills & left
            bound = 2 * len(shared) / (len(kills) + len(left)) if shared else 0.0
            if mutant.id not in self.without and (bound >= LEAST_LIKENESS or (shared and shared == kills)):
                found.append((mutant, kills, bound))
        return sorted(found, key=lambda f: -f[2])

    def fit(self, mutant: Mutant, kills: set[Pair], left: set[Pair], least: float) -> Fit | None:
        """How well it fits; None as soon as that cannot be good enough: neither whole nor of likeness `least`."""
        shared = sorted(kills & left, key=lambda pair: self.failed[pair].seconds)  # what is quick first
        least = max(least, LEAST_LIKENESS)
        explained: set[Pair] = set()
        numbers: set[str] = set()
        for n, pair in enumerate(shared):
            if time.perf_counter() > self.end:
                return None
            mine = self.shown_by(mutant, self.failed[pair])
            if mine is not None:
                explained.add(pair)
                numbers |= {pair[0]} if mine.numbers else set()
            most = len(explained) + len(shared) - n - 1
            if most < len(kills) and 2 * most / (len(kills) + len(left)) < least:
                return None
        likeness = 2 * len(explained) / (len(kills) + len(left))
        clauses = {c for c, _ in explained}
        return Fit(mutant, likeness, explained == kills, frozenset(explained), len(clauses), len(numbers))

    def shown_by(self, mutant: Mutant, result: Result) -> Seen | None:
        """What the mutant shows in the check that failed, where that is what the port showed."""
        finding = result.finding
        if finding is None or finding.crash:
            return None
        if finding.run and self.declares_all:
            first = awkward_runs().get(mutant.id, {}).get(result.dtype, {}).get(result.clause.id)
            if first != finding.run:  # it goes through the same runs, and fails another first
                return None
        other = shown(mutant.id, result.clause.id, finding.run, result.dtype, self.capabilities)
        return other if other and same(seen(finding, result.talk), other, result.dtype) else None
