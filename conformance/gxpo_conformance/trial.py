"""Runs the checks against a port and comes to a verdict."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gxpo_conformance import interrupt
from gxpo_conformance.clauses.table import CHECKS, Clause, clauses
from gxpo_conformance.harness.case import Case, as_case
from gxpo_conformance.harness.findings import Failure, Finding, NeedsWindow
from gxpo_conformance.harness.harness import TIME_LIMIT, Dialogue, Harness
from gxpo_conformance.known import Known
from gxpo_conformance.protocol import DTYPES, AdapterError, Port, check_capabilities, declares
from gxpo_conformance.runs.play import RANDOM_RUNS, SEED, has_runs
from gxpo_conformance.runs.play import check as check_runs

PASS, FAIL, ERROR, KNOWN = "pass", "fail", "error", "known-fail"
BLOCKED, UNDECLARED, NOT_RUN = "blocked", "undeclared", "not run"
VERDICTS = (FAIL, KNOWN, BLOCKED, ERROR, PASS, UNDECLARED, NOT_RUN)  # the worst first; an error is a pass, ill listed
OPTIMIZERS_FIRST = ("OPT-01", "OPT-02", "OPT-03")  # the awkward runs of all others lean on them
WHOLE = ("INV", "TOY", "RND")  # about the step as a whole: where only these fail, awkward runs may tell the rule
MOST_TIME_OUTS = 3  # then the rest is blocked: eighty time limits one after another would look like a stuck run


@dataclass(frozen=True)
class Result:
    """One clause in one dtype."""

    clause: Clause
    dtype: str
    verdict: str
    message: str = ""
    finding: Finding | None = None  # of a failure
    talk: Dialogue | None = None  # in which it failed
    known: Known | None = None
    seconds: float = 0.0

    def case(self) -> Case | None:
        """The failing run as data, to stand alone; None where nothing was asked."""
        return as_case(self.talk) if self.talk and self.talk.steps else None


@dataclass
class Verdict:
    """Everything that a run found; `results` by clause, then by dtype."""

    port: str
    device: str
    dtypes: list[str]
    capabilities: dict[str, Any]
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    seed: int = SEED  # of the random runs
    known: Mapping[str, Known] = field(default_factory=dict)  # what --known lists
    interrupted: str = ""  # "after 31 of 75 clauses", where Ctrl-C ended it

    def every(self) -> list[Result]:
        return [r for dtypes in self.results.values() for r in dtypes.values()]

    def of(self, clause: str) -> str:
        """The clause as a whole: the worst of its dtypes; "not run" where it was left out or no dtype could show it."""
        found = {r.verdict for r in self.results.get(clause, {}).values()}
        nothing = NOT_RUN if applies(clauses()[clause], self.capabilities) else UNDECLARED
        return next((v for v in VERDICTS if v in found), nothing)

    def count(self, level: str, *verdicts: str) -> int:
        return sum(c.level == level and self.of(c.id) in verdicts for c in clauses().values())

    def which(self, *verdicts: str) -> list[str]:
        """Clauses that came out so."""
        return [c for c in clauses() if self.of(c) in verdicts]

    @property
    def failed(self) -> list[str]:
        return self.which(FAIL)

    @property
    def stale(self) -> list[str]:
        """What is listed as known to fail and passes, in words."""
        said = []
        for number, results in self.results.items():
            passing = [r.dtype for r in results.values() if r.verdict == ERROR]
            failing = [r.dtype for r in results.values() if r.verdict == KNOWN]
            if passing and failing:
                listed = ", ".join(f'"{dtype}"' for dtype in failing)
                said.append(
                    f"{number} passes in {', '.join(passing)}, though --known lists it as failing there: "
                    f"let its entry say dtypes = [{listed}]"
                )
            elif passing:
                said.append(f"{number} passes, though --known lists it as failing: take it off the list")
        return said

    @property
    def notes(self) -> list[str]:
        """What of the declaration was left out, and of --known had no use, in words; it changes no verdict."""
        left = [dtype for dtype in self.capabilities["dtypes"] if dtype not in self.dtypes]
        said = [f"declared and not run: {', '.join(left)} (--dtype chose)"] if left else []
        for number, entry in self.known.items():
            found = self.of(number)
            absent = [dtype for dtype in entry.dtypes if dtype not in self.dtypes]
            if found == UNDECLARED:
                needs = ", ".join(clauses()[number].needs)
                said.append(f"--known lists {number}, which this port does not declare (it needs {needs})")
            elif found in (BLOCKED, NOT_RUN) and not self.interrupted:
                said.append(f"--known lists {number}, which was not run ({found})")
            elif absent:
                said.append(f"--known lists {number} in {', '.join(absent)}, which was not run")
        return said

    @property
    def complete(self) -> bool:
        """Every MUST ran, and passed or is known to fail."""
        return self.count("MUST", PASS, KNOWN, ERROR) == self.must

    @property
    def must(self) -> int:
        """How many MUST bind this port."""
        return sum(c.level == "MUST" and applies(c, self.capabilities) for c in clauses().values())

    @property
    def headline(self) -> str:
        not_run = sum(self.count(level, BLOCKED, NOT_RUN) for level in ("MUST", "OPTION"))
        known = len(self.which(KNOWN))
        return (
            f"{self.count('MUST', PASS, ERROR)}/{self.must} MUST, "
            f"{self.count('OPTION', PASS, ERROR)}/{self.declared} declared options, {not_run} not run"
            + (f", {known} known to fail" if known else "")
        )

    @property
    def declared(self) -> int:
        """Options that bind this port."""
        return self.count("OPTION", PASS, FAIL, ERROR, KNOWN, BLOCKED, NOT_RUN)

    @property
    def words(self) -> str:
        return "; ".join([self.judgement, *self.stale])

    @property
    def judgement(self) -> str:
        """The verdict, without what is to be said of --known."""
        if self.interrupted:
            so_far = f"failed so far: {', '.join(self.failed)}" if self.failed else "none of those that ran failed"
            return f"interrupted {self.interrupted}; {so_far}"
        if self.failed:
            return f"not conformant: {', '.join(self.failed)}"
        if not self.complete:
            return "incomplete"
        if self.which(KNOWN):
            return f"not conformant, as known: {', '.join(self.which(KNOWN))}"
        passed = self.count("OPTION", PASS, ERROR)
        return "conformant (core + the declared options)" if passed == self.declared > 0 else "conformant (core)"

    @property
    def exit_status(self) -> int:
        if self.interrupted:
            return interrupt.STATUS
        return 1 if self.failed or self.stale else 0 if self.complete else 3


class Trial:
    """A port under judgement: settles clauses one by one, each once, those that it leans on first.

    `known`: clauses that are known to fail. Raises AdapterError where no verdict can be reached: a broken declaration,
    an undeclared device or dtype.
    """

    def __init__(
        self,
        port: Port,
        dtypes: Iterable[str] | None = None,
        device: str = "cpu",
        known: Mapping[str, Known] | None = None,
        time_limit: float = TIME_LIMIT,
        seed: int = SEED,
        awkward: Collection[str] | None = None,
    ) -> None:
        try:
            declared = check_capabilities(port.capabilities())
            declared["in process"] = getattr(port, "in_process", True)
            name = str(port.name)
        except AdapterError:
            raise
        except BaseException as error:  # SystemExit as well, and whatever else a port may raise
            if interrupt.is_the_users(error):
                raise
            raise AdapterError(f"the adapter broke before the first step: {error!r}") from error
        chosen = list(dtypes or [d for d in DTYPES if d in declared["dtypes"]])
        for what, wanted in (("dtypes", chosen), ("devices", [device])):
            missing = [w for w in wanted if w not in declared[what]]
            if missing:
                raise AdapterError(f"{name} does not declare {', '.join(missing)} among its {what}: {declared[what]}")
        by_width = sorted(chosen, key=DTYPES.index)
        limit = None if hasattr(port, "time_limit") else time_limit  # a port in a process of its own keeps time itself
        self.harnesses = {
            dtype: Harness(port, declared, dtype, device, limit, foremost=not n) for n, dtype in enumerate(by_width)
        }
        self.known = known or {}
        self.verdict = Verdict(name, device, chosen, declared, known=self.known, seed=seed)
        self.timed_out: list[str] = []
        self.awkward = awkward  # the clauses whose awkward runs are played; None: all
        self.fixed: dict[str, dict[str, Result]] = {}

    def settle(self, number: str) -> dict[str, Result]:
        """The clause's results, by dtype: its fixed cases, then its awkward runs."""
        if number not in self.verdict.results:
            fixed = self.fixed_cases(number)
            self.verdict.results[number] = {
                dtype: self.awkward_runs(result, self.harnesses[dtype]) for dtype, result in fixed.items()
            }
        return self.verdict.results[number]

    def fixed_cases(self, number: str) -> dict[str, Result]:
        """What the clause's fixed cases say, by dtype."""
        if number not in self.fixed:
            for lean in CHECKS[number].leans:
                self.fixed_cases(lean)
            clause = clauses()[number]
            self.fixed[number] = {
                dtype: self.judge(clause, harness)
                for dtype, harness in self.harnesses.items()
                if dtype in CHECKS[number].dtypes or not applies(clause, harness.capabilities)
            }
        return self.fixed[number]

    def judge(self, clause: Clause, harness: Harness) -> Result:
        """The fixed cases of one clause in one dtype."""
        if not applies(clause, harness.capabilities):
            return Result(clause, harness.dtype, UNDECLARED, "needs " + ", ".join(clause.needs))
        if len(self.timed_out) >= MOST_TIME_OUTS:
            return Result(clause, harness.dtype, BLOCKED, f"the port ran out of time in {', '.join(self.timed_out)}")
        for lean in CHECKS[clause.id].leans:
            found = self.fixed[lean].get(harness.dtype)
            if found is not None and found.verdict in (FAIL, KNOWN, BLOCKED):
                return Result(clause, harness.dtype, BLOCKED, f"leans on {lean}, which did not pass")
        if clause.id in RANDOM_RUNS:  # what it has comes with the awkward runs
            return Result(clause, harness.dtype, PASS)
        return self.tried(clause, harness, CHECKS[clause.id].function)

    def awkward_runs(self, fixed: Result, harness: Harness) -> Result:
        """`fixed`, or what the clause's awkward runs found where its fixed cases pass.

        They put many rules together, so that one mistake would fail most of them: after the first failure in a dtype
        they wait until it is mended.
        """
        clause, dtype = fixed.clause, fixed.dtype
        left_out = self.awkward is not None and clause.id not in self.awkward
        if fixed.verdict not in (PASS, ERROR) or not has_runs(clause.id) or left_out:
            return fixed
        first = self.first_failure(dtype)
        if first is None:
            found = self.tried(clause, harness, lambda harness: check_runs(harness, clause.id, self.verdict.seed))
            return replace(found, seconds=found.seconds + fixed.seconds)
        if clause.id in RANDOM_RUNS:
            return replace(fixed, verdict=BLOCKED, message=f"waits for {first}, which did not pass")
        return replace(fixed, message=f"its fixed cases alone; its awkward runs wait for {first}, which did not pass")

    def interrupted(self, chosen: list[str]) -> None:
        """The verdict as it stands where Ctrl-C came: of what has had its fixed cases alone, these count."""
        results = self.verdict.results
        for number in chosen:
            if number in self.fixed and number not in results and not number.startswith("RND"):
                results[number] = {
                    dtype: replace(r, message=r.message or "its fixed cases alone: the run was interrupted")
                    for dtype, r in self.fixed[number].items()
                }
        done = sum(number in results for number in chosen)
        self.verdict.interrupted = f"after {done} of {len(chosen)} clauses"

    def first_failure(self, dtype: str) -> str | None:
        """The first clause about one rule that did not pass in `dtype`, by what is known so far."""
        for number in (n for n in clauses() if n[:3] not in WHOLE):
            for results in (self.fixed.get(number, {}), self.verdict.results.get(number, {})):
                if dtype in results and results[dtype].verdict in (FAIL, KNOWN):
                    return number
        return None

    def tried(self, clause: Clause, harness: Harness, function: Callable[[Harness], None]) -> Result:
        """What comes of a check."""
        began = time.perf_counter()
        failure, known = outcome_of(function, harness), self.known.get(clause.id)
        seconds = time.perf_counter() - began
        known = known if known and (not known.dtypes or harness.dtype in known.dtypes) else None
        if failure is None and known:
            message = f"passes, though --known lists it as failing ({known.reason}): take it off the list"
            return Result(clause, harness.dtype, ERROR, message, known=known, seconds=seconds)
        if failure is None:
            return Result(clause, harness.dtype, PASS, seconds=seconds)
        if failure.finding.timed_out:
            self.timed_out.append(f"{clause.id} in {harness.dtype}")
        return Result(
            clause,
            harness.dtype,
            KNOWN if known else FAIL,
            str(failure),
            failure.finding,
            harness.latest,
            known,
            seconds,
        )


def attempt(clause: str, harness: Harness) -> Failure | None:
    """Put the fixed cases of a clause; how they failed, or None."""
    return outcome_of(CHECKS[clause].function, harness)


def outcome_of(function: Callable[[Harness], None], harness: Harness) -> Failure | None:
    """Run a check; how it failed, or None."""
    harness.talks.clear()
    harness.latest = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what a port prints is not part of the report
            function(harness)
    except Failure as failure:
        return failure
    except NeedsWindow:  # the awkward runs of the clause do without
        pass
    return None


def applies(clause: Clause, declared: dict[str, Any]) -> bool:
    return all(declares(declared, need) for need in clause.needs)


def judge(
    port: Port,
    dtypes: Iterable[str] | None = None,
    device: str = "cpu",
    only: Iterable[str] = (),
    on_clause: Callable[[Clause, Verdict], None] = lambda clause, verdict: None,
    known: Mapping[str, Known] | None = None,
    time_limit: float = TIME_LIMIT,
    seed: int = SEED,
    awkward: Collection[str] | None = None,
) -> Verdict:
    """Judge `port` by every clause, or by those that `only` names (EXT, GAT-07); `awkward`: the clauses whose awkward
    runs are played (None: all). Raises as Trial does. Where the user's
    Ctrl-C comes (interrupt.py), the verdict is on what ran so far, and says so."""
    trial = Trial(port, dtypes, device, known, time_limit, seed, awkward)
    chosen = [number for number in clauses() if not only or any(number.startswith(o) for o in only)]
    try:
        for number in chosen:
            trial.fixed_cases(number)
        for number in OPTIMIZERS_FIRST:
            if number in chosen:
                trial.settle(number)
        for number in chosen:
            trial.settle(number)
            on_clause(clauses()[number], trial.verdict)
    except interrupt.Interrupted:
        trial.interrupted(chosen)
    return trial.verdict
