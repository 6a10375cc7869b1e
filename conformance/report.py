"""The terminal's report."""

from __future__ import annotations

import shutil
import textwrap

from gxpo_conformance.checks import GROUPS, SPEC_VERSION, Clause
from gxpo_conformance.run import BLOCKED, FAIL, NOT_RUN, UNDECLARED, Verdict

CELL = 12  # "undeclared" and a space


class Terminal:
    """Prints each clause as it is settled, a column a dtype, as wide as the terminal allows."""

    def __init__(self) -> None:
        self.group = ""
        self.columns = shutil.get_terminal_size(fallback=(132, 24)).columns

    def __call__(self, clause: Clause, verdict: Verdict) -> None:
        width = max(24, min(78, self.columns - 16 - CELL * len(verdict.dtypes)))
        if not self.group:
            print(f"GXPO conformance {SPEC_VERSION}: {verdict.port} on {verdict.device}\n")
            print(" " * (width + 17) + "".join(f"{d:<{CELL}}" for d in verdict.dtypes).rstrip())
        if clause.id[:3] != self.group:
            self.group = clause.id[:3]
            print(f"{self.group}  {GROUPS[self.group]}")
        rule = textwrap.shorten(clause.rule, width, placeholder=" ...")
        cells = [verdict.results[clause.id].get(d) for d in verdict.dtypes]
        shown = "".join(f"{'-' if cell is None else cell.verdict:<{CELL}}" for cell in cells)
        print(f"  {clause.id}  {clause.level:<6} {rule:<{width}} {shown}".rstrip(), flush=True)


def summary(verdict: Verdict, seconds: float) -> None:
    """What failed and why, what did not run, the headline, and a footer that a cut-off report lacks."""
    print()
    results = [r for dtypes in verdict.results.values() for r in dtypes.values()]
    for r in results:
        if r.verdict == FAIL:
            print(f"FAIL  {r.clause.id}  {r.dtype}  {r.clause.rule}")
            print(textwrap.indent(textwrap.fill(r.message, 110), "      "))
    for cause in dict.fromkeys(r.message for r in results if r.verdict == BLOCKED):
        blocked = dict.fromkeys(r.clause.id for r in results if r.message == cause)
        print(textwrap.fill(f"BLOCKED, {cause}: {', '.join(blocked)}", 116, subsequent_indent="      "))
    idle = [c for c in verdict.results if verdict.of(c) == NOT_RUN]
    if idle:
        print(textwrap.fill(f"no dtype of this run can show {', '.join(idle)}", 116, subsequent_indent="      "))
    if set(verdict.dtypes) == {"bfloat16"}:
        print("bfloat16 parameters show the coarse rules only: run float64 or float32 as well")
    ran = sum(r.verdict not in (UNDECLARED, BLOCKED) for r in results)
    print(f"GXPO {SPEC_VERSION}: {verdict.headline}")
    print(f"verdict: {verdict.words}")
    print(f"{ran} checks ran in {seconds:.1f} s; end of report")
