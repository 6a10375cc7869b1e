"""The terminal's report."""

from __future__ import annotations

import shutil
import sys
import textwrap

from gxpo_conformance.clauses.table import GROUPS, SPEC_VERSION, Clause
from gxpo_conformance.reports.causes import headline, told
from gxpo_conformance.reports.record import MOST_NAME, Record, legible, on_a_line
from gxpo_conformance.reports.score import score_lines
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, KNOWN, NOT_RUN, PASS, UNDECLARED, Verdict

CELL = 12  # "undeclared" and a space
MOST_SHOWN = 12  # failures told in full; what one mistake does to forty clauses need not be read forty times
MOST_CAUSES = 8  # of them, the largest
MOST_TOLD = 1200  # characters of one message


def say(text: str = "") -> None:
    """Print; what the terminal's encoding cannot say is a question mark: no port's name ends the report."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


class Terminal:
    """Prints each clause as it is settled, a column a dtype, as wide as the terminal allows."""

    def __init__(self) -> None:
        self.group = ""
        self.columns = shutil.get_terminal_size(fallback=(132, 24)).columns

    def __call__(self, clause: Clause, verdict: Verdict) -> None:
        width = max(24, min(78, self.columns - 16 - CELL * len(verdict.dtypes)))
        if not self.group:
            say(f"GXPO conformance {SPEC_VERSION}: {on_a_line(verdict.port, MOST_NAME)} on {verdict.device}\n")
            say(" " * (width + 17) + "".join(f"{d:<{CELL}}" for d in verdict.dtypes).rstrip())
        if clause.id[:3] != self.group:
            self.group = clause.id[:3]
            say(f"{self.group}  {GROUPS[self.group]}")
        rule = textwrap.shorten(clause.rule, width, placeholder=" ...")
        cells = [verdict.results[clause.id].get(d) for d in verdict.dtypes]
        shown = "".join(f"{'-' if cell is None else cell.verdict:<{CELL}}" for cell in cells)
        say(f"  {clause.id}  {clause.level:<6} {rule:<{width}} {shown}".rstrip())


def wrapped(text: str, indent: str = "      ") -> str:
    """Paragraphs within the width, what a port said on several lines kept on several."""
    lines = [textwrap.wrap(line, 110, break_on_hyphens=False) or [""] for line in legible(text, MOST_TOLD).splitlines()]
    return "\n".join(indent + part for line in lines for part in line)


def say_causes(causes: list[Record]) -> None:
    """What is to be mended, before all that it breaks."""
    if len(causes) == 1:
        say(wrapped(f"1 cause: {told(causes[0])}", "") + "\n")
    elif causes:
        lines = [wrapped(f"{n}. {told(c)}", "  ") for n, c in enumerate(causes[:MOST_CAUSES], 1)]
        more = [f"  ... and {len(causes) - MOST_CAUSES} more"] if len(causes) > MOST_CAUSES else []
        say("\n".join([f"{headline(causes)}:", *lines, *more]) + "\n")


def summary(records: list[Record]) -> None:
    """What failed and why, what did not run, the headline, and a footer that a cut-off report lacks."""
    head, *results, foot = records
    say()
    failures = [r for r in results if r["verdict"] in (FAIL, ERROR)]
    say_causes(foot["causes"])
    for r in failures[:MOST_SHOWN]:
        say(f"{r['verdict'].upper():<5} {r['clause']}  {r['dtype']}  {r['rule']}")
        say(wrapped(r["message"]))
        if len(foot["causes"]) > 1 and "cause" in r:
            say(f"      cause {r['cause']}")
        if "rerun" in r:
            say(f"      {r['rerun']}")
    if len(failures) > MOST_SHOWN:
        say(f"... and {len(failures) - MOST_SHOWN} more; --json or --html has them all")
    known: dict[str, list[str]] = {}
    for r in results:
        if r["verdict"] == KNOWN:
            known.setdefault(f"{r['clause']}: {r['known']['reason']} {r['known']['link']}", []).append(r["dtype"])
    for what, dtypes in known.items():
        say(wrapped(f"known to fail in {', '.join(dtypes)}, {what}", ""))
    for cause in dict.fromkeys(r["message"] for r in results if r["verdict"] == BLOCKED):
        blocked = dict.fromkeys(r["clause"] for r in results if r["message"] == cause)
        say(textwrap.fill(f"BLOCKED, {cause}: {', '.join(blocked)}", 116, subsequent_indent="      "))
    idle = [r["clause"] for r in results if r["verdict"] == NOT_RUN]
    if idle:
        say(textwrap.fill(f"no dtype of this run can show {', '.join(idle)}", 116, subsequent_indent="      "))
    if set(head["dtypes"]) == {"bfloat16"}:
        say("bfloat16 parameters show the coarse rules only: run float64 or float32 as well")
    ran = sum(r["verdict"] not in (UNDECLARED, BLOCKED, NOT_RUN) for r in results)
    if any(r["verdict"] not in (PASS, UNDECLARED) for r in results):
        say()
    for line in score_lines(records):
        say(textwrap.fill(line, 116, subsequent_indent="      ", break_on_hyphens=False))
    say(f"GXPO {SPEC_VERSION}: {foot['headline']}")
    for note in foot["notes"]:
        say(wrapped(note, ""))
    say(f"verdict: {foot['words']}")
    drawn = any(r["clause"].startswith("RND") and r["verdict"] in (PASS, FAIL) for r in results)
    random = f", random runs by seed {head['seed']}" if drawn else ""
    say(f"{ran} checks ran in {foot['seconds']:.1f} s{random}; end of report")
