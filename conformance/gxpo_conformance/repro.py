"""Plays one clause, awkward run, vector or failing case again; shows every point asked for beside the right one."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.harness.case import as_case, replay
from gxpo_conformance.harness.findings import CaseError, Failure
from gxpo_conformance.harness.harness import Dialogue, Harness
from gxpo_conformance.mutants.nearest import Nearest
from gxpo_conformance.outputs import write
from gxpo_conformance.protocol import AdapterError, Port
from gxpo_conformance.reports.side_by_side import show
from gxpo_conformance.runs import play
from gxpo_conformance.stored import BROKEN, malformed, missing, read
from gxpo_conformance.trial import FAIL, PASS, Trial, applies

TARGETS = (
    "TARGET: a clause (GAT-07), an awkward run that a report names (NUM-03#4, RND-02#0/117), a vector (GAT-07/1), or a "
    "file that --case, `search --case` or a report's case gave."
)
STATUS = (
    "Exit status: 0 it passes; 1 it fails; 2 the adapter, the case or the command line is broken, or the port refuses "
    "a configuration that it declares; 3 the port does not declare what the case needs, or rounding decides the case; "
    "130 interrupted by Ctrl-C."
)
RUN = re.compile(r"([A-Z]+-\d+)#\S+")


def reproduce(
    target: str, port: Port, dtypes: Sequence[str] | None, device: str, case_file: str | None, time_limit: float
) -> int:
    """The exit status, as STATUS has it. `case_file`: where to write the run that fails, the first of several."""
    trial = Trial(port, dtypes, device, time_limit=time_limit)
    if target.upper() in clauses():
        return Player(trial, case_file).clause(target.upper())
    if RUN.fullmatch(target.upper()) and not Path(target).exists():
        return Player(trial, case_file).awkward_run(target.upper())
    return Player(trial, case_file).stored_case(target)


class Player:
    """Plays what was named, in each of the trial's dtypes that can show it."""

    def __init__(self, trial: Trial, case_file: str | None) -> None:
        self.trial, self.case_file = trial, case_file

    def clause(self, number: str) -> int:
        """All of a clause, what it leans on first."""
        print(f"{number}  {clauses()[number].rule}")
        results = self.trial.settle(number)
        ran = [r for r in results.values() if r.verdict in (PASS, FAIL)]
        for result in results.values():
            print(f"\n{self.trial.verdict.port}, {result.dtype}: {result.verdict}  {result.message}")
            if result.verdict == FAIL:
                if result.talk:
                    show(result.talk)
                if found := Nearest(self.trial.verdict).of(result):
                    print(found.words)
                self.keep(result.talk, number)
        if any(r.verdict == FAIL for r in ran):
            return 1
        if not results:
            print(f"none of these dtypes can show it, only {', '.join(CHECKS[number].dtypes)}")
        return 0 if ran else 3

    def awkward_run(self, name: str) -> int:
        """One of a clause's awkward runs, as the suite plays it: where it fails, the smallest like it that fails."""
        number = name.partition("#")[0]
        statuses = []
        for harness in self.trial.harnesses.values():
            try:
                awkward = play.named(name, harness)
            except ValueError as error:
                raise AdapterError(str(error)) from error
            print(f"{name}, {harness.dtype}, {self.trial.verdict.port}: {play.told(awkward)}")
            clause = clauses()[number]
            if not applies(clause, harness.capabilities):
                print(f"not played: the port does not declare what {number} needs: {', '.join(clause.needs)}")
                statuses.append(3)
            elif harness.dtype not in CHECKS[number].dtypes:
                print(f"not played: {number} cannot be seen in {harness.dtype}")
                statuses.append(3)
            else:
                statuses.append(self.played(awkward, harness))
        return 1 if 1 in statuses else 0 if 0 in statuses else 3

    def played(self, awkward: play.Awkward, harness: Harness) -> int:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what a port prints
                run = play.play(harness, awkward)
        except CaseError as error:
            print(f"not judged: {error}")
            return 3
        except Failure as failure:
            with contextlib.redirect_stdout(io.StringIO()):
                smallest = play.shrunk(harness, awkward, failure)
            return self.failed(smallest, harness, awkward.name.partition("#")[0])
        print(f"pass, at most {run.used:.2g} of {ALLOWED:g} rounding budgets used")
        return 0

    def stored_case(self, target: str) -> int:
        """A file or a vector."""
        case = read(target)
        declared = self.trial.verdict.capabilities
        print(f"{target}: {case.get('comment', 'a case')}, {case['dtype']}, {self.trial.verdict.port}")
        if lacking := missing(case, declared):
            print(f"not played: the port does not declare {', '.join(lacking)}")
            return 3
        if case["dtype"] not in self.trial.harnesses:
            raise AdapterError(f"{target} is a case in {case['dtype']}, which --dtype leaves out")
        harness = self.trial.harnesses[case["dtype"]]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what a port prints
                used = replay(harness, case)
        except Failure as failure:
            if isinstance(failure.__cause__, ValueError) and not harness.talks:  # out of the very first start()
                why = f"the port refuses the configuration of {target}, though it declares all of it"
                raise AdapterError(f"{why}: {failure.__cause__}") from failure
            return self.failed(failure, harness)
        except BROKEN as error:  # not the port's: what a port raises is a Failure
            raise AdapterError(malformed(target, error)) from error
        print(f"pass, at most {used:.2g} of a tolerance used")
        return 0

    def failed(self, failure: Failure, harness: Harness, clause: str | None = None) -> int:
        if harness.latest:
            show(harness.latest)
        print(f"FAIL  {failure}")
        self.keep(harness.latest, clause)
        return 1

    def keep(self, talk: Dialogue | None, clause: str | None) -> None:
        """Write the run as a case, where a file was named for it."""
        if self.case_file and talk and talk.steps:
            case = {**({"clause": clause} if clause else {}), **as_case(talk)}
            write("--case", self.case_file, json.dumps(case, indent=1) + "\n")
            print(f"the run is in {self.case_file}: gxpo-conformance repro {self.case_file} plays it again")
            self.case_file = None  # the first that fails
