"""Runs the checks against a port and comes to a verdict."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gxpo_conformance import cases  # noqa: F401 (registers the checks)
from gxpo_conformance.bench import Bench, Failure
from gxpo_conformance.checks import CHECKS, Clause, clauses
from gxpo_conformance.protocol import DTYPES, AdapterError, Port, check_capabilities, declares

PASS, FAIL, BLOCKED, UNDECLARED, NOT_RUN = "pass", "fail", "blocked", "undeclared", "not run"


@dataclass(frozen=True)
class Result:
    """One clause in one dtype."""

    clause: Clause
    dtype: str
    verdict: str
    message: str = ""


@dataclass
class Verdict:
    """Everything that a run found; `results` by clause, then by dtype."""

    port: str
    device: str
    dtypes: list[str]
    results: dict[str, dict[str, Result]] = field(default_factory=dict)

    def of(self, clause: str) -> str:
        """The clause as a whole: the worst of its dtypes; "not run" where no dtype could show it."""
        found = {r.verdict for r in self.results.get(clause, {}).values()}
        return next((v for v in (FAIL, BLOCKED, PASS, UNDECLARED) if v in found), NOT_RUN)

    def count(self, level: str, *verdicts: str) -> int:
        return sum(c.level == level and self.of(c.id) in verdicts for c in clauses().values())

    @property
    def failed(self) -> list[str]:
        return [c for c in clauses() if self.of(c) == FAIL]

    @property
    def complete(self) -> bool:
        """Every MUST ran and passed."""
        return self.count("MUST", PASS) == self.must

    @property
    def must(self) -> int:
        return sum(c.level == "MUST" for c in clauses().values())

    @property
    def headline(self) -> str:
        not_run = sum(self.count(level, BLOCKED, NOT_RUN) for level in ("MUST", "OPTION"))
        return (
            f"{self.count('MUST', PASS)}/{self.must} MUST, "
            f"{self.count('OPTION', PASS)}/{self.declared} declared options, {not_run} not run"
        )

    @property
    def declared(self) -> int:
        """Options that bind this port; with --only, of those looked at."""
        return self.count("OPTION", PASS, FAIL, BLOCKED, NOT_RUN)

    @property
    def words(self) -> str:
        if self.failed:
            return f"not conformant: {', '.join(self.failed)}"
        if not self.complete:
            return "incomplete"
        passed = self.count("OPTION", PASS)
        return "conformant (core + the declared options)" if passed == self.declared > 0 else "conformant (core)"

    @property
    def exit_status(self) -> int:
        return 1 if self.failed else 0 if self.complete else 3


def run(
    port: Port,
    dtypes: Iterable[str] | None = None,
    device: str = "cpu",
    only: Iterable[str] = (),
    on_clause: Callable[[Clause, Verdict], None] = lambda clause, verdict: None,
) -> Verdict:
    """Judge `port` by every clause, or by those that `only` names (EXT, GAT-07).

    Raises AdapterError where no verdict can be reached: a broken declaration, an undeclared device or dtype.
    """
    try:
        declared = check_capabilities(port.capabilities())
        name = str(port.name)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"the adapter broke before the first step: {error!r}") from error
    chosen = list(dtypes or [d for d in DTYPES if d in declared["dtypes"]])
    for what, wanted in (("dtypes", chosen), ("devices", [device])):
        missing = [w for w in wanted if w not in declared[what]]
        if missing:
            raise AdapterError(f"{name} does not declare {', '.join(missing)} among its {what}: {declared[what]}")

    verdict = Verdict(name, device, chosen)
    benches = {dtype: Bench(port, declared, dtype, device) for dtype in chosen}

    def settle(number: str) -> None:
        if number in verdict.results:
            return
        for lean in CHECKS[number].leans:  # what others lean on is judged first
            settle(lean)
        clause, runs_in = clauses()[number], CHECKS[number].dtypes
        verdict.results[number] = {
            dtype: judge(clause, bench, verdict)
            for dtype, bench in benches.items()
            if dtype in runs_in or not applies(clause, declared)
        }

    for number, clause in clauses().items():
        if not only or any(number.startswith(o) for o in only):
            settle(number)
            on_clause(clause, verdict)
    return verdict


def applies(clause: Clause, declared: dict) -> bool:
    return all(declares(declared, need) for need in clause.needs)


def judge(clause: Clause, bench: Bench, verdict: Verdict) -> Result:
    """One clause in one dtype."""
    if not applies(clause, bench.capabilities):
        return Result(clause, bench.dtype, UNDECLARED, "needs " + ", ".join(clause.needs))
    check = CHECKS[clause.id]
    for lean in check.leans:
        found = verdict.results.get(lean, {}).get(bench.dtype)
        if found is not None and found.verdict in (FAIL, BLOCKED):
            return Result(clause, bench.dtype, BLOCKED, f"leans on {lean}, which did not pass")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what a port prints is not part of the report
            check.function(bench)
    except Failure as failure:
        return Result(clause, bench.dtype, FAIL, str(failure))
    return Result(clause, bench.dtype, PASS)
