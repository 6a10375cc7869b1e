"""The terminal's report."""

from __future__ import annotations

import textwrap

from gxpo_conformance.checks import GROUPS, SPEC_VERSION, Clause
from gxpo_conformance.run import BLOCKED, FAIL, NOT_RUN, Verdict

WIDTH = 78


class Terminal:
    """Prints each clause as it is settled, a column a dtype."""

    def __init__(self) -> None:
        self.group = ""

    def __call__(self, clause: Clause, verdict: Verdict) -> None:
        if not self.group:
            print(f"GXPO conformance {SPEC_VERSION}: {verdict.port} on {verdict.device}\n")
            print(" " * (WIDTH + 16) + "  ".join(f"{d:<10}" for d in verdict.dtypes).rstrip())
        if clause.id[:3] != self.group:
            self.group = clause.id[:3]
            print(f"{self.group}  {GROUPS[self.group]}")
        rule = textwrap.shorten(clause.rule, WIDTH, placeholder=" ...")
        cells = [verdict.results[clause.id].get(d) for d in verdict.dtypes]
        shown = "  ".join(f"{'-' if cell is None else cell.verdict:<10}" for cell in cells)
        print(f"  {clause.id}  {clause.level:<6}  {rule:<{WIDTH}}{shown}".rstrip(), flush=True)


def summary(verdict: Verdict, seconds: float) -> None:
    """What failed and why, what did not run, the headline, and a footer that a cut-off report lacks."""
    print()
    for dtypes in verdict.results.values():
        for r in dtypes.values():
            if r.verdict in (FAIL, BLOCKED):
                print(f"{r.verdict.upper()}  {r.clause.id}  {r.dtype}")
                print(textwrap.indent(textwrap.fill(f"{r.clause.rule}\n{r.message}", 110), "      "))
    idle = [c for c in verdict.results if verdict.of(c) == NOT_RUN]
    if idle:
        print(f"no dtype of this run can show {', '.join(idle)}")
    if set(verdict.dtypes) == {"bfloat16"}:
        print("bfloat16 parameters show the coarse rules only: run float64 or float32 as well")
    ran = sum(r.verdict not in ("undeclared", BLOCKED) for d in verdict.results.values() for r in d.values())
    print(f"GXPO {SPEC_VERSION}: {verdict.headline}")
    print(f"verdict: {verdict.words}")
    print(f"{ran} checks ran in {seconds:.1f} s; end of report")
