"""The run as one page that needs nothing else: no script, no font, no address to fetch from."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from gxpo_conformance.clauses.table import CHECKS, GROUPS, SPEC_VERSION, clauses
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.protocol import DTYPES
from gxpo_conformance.reports.record import Record
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, KNOWN, NOT_RUN, PASS, UNDECLARED, VERDICTS

OPEN = 12  # failures shown unfolded; what one mistake does to forty clauses need not be read forty times
MOST_CASE = 100_000  # characters of one failing run as JSON; a longer one is left to the command that writes it
ABSENT = "absent"  # a cell that this dtype cannot fill

# A sign for those who cannot tell the colours apart, and what the word means.
LEGEND = {
    PASS: ("✓", "ran, and the port does what the clause says"),
    FAIL: ("✗", "ran, and the port does something else"),
    ERROR: ("!", "passes, though it is listed as known to fail"),
    KNOWN: ("≈", "fails, as the port's author has listed with a reason"),
    BLOCKED: ("⊘", "not run: what it leans on did not pass, or the port ran out of time"),
    UNDECLARED: ("\N{EN DASH}", "not run: an option that the port does not declare"),
    NOT_RUN: ("○", "not run: left out, or no dtype of this run can show it"),
    ABSENT: ("·", "this dtype cannot show it"),
}


def html(records: list[Record], matrix: dict[str, Any]) -> str:
    """The page of one run. `matrix`: of the suite's own mutants, as selftest makes it; empty for none."""
    head, *results, foot = records
    rows = by_clause(results, head["dtypes"])
    title = f"{head['port']}: {foot['words'].split(':')[0]}"
    return page(title=title, run=about_run(head, rows, foot), matrix=about_matrix(matrix) if matrix else None)


def matrix_page(matrix: dict[str, Any]) -> str:
    """The page of a selftest: the mutants, what rejects them, and whether the suite is as good as it should be."""
    return page(title="The suite's own test", run=None, matrix=about_matrix(matrix))


@functools.cache
def template() -> jinja2.Template:
    # Whatever a port says is text: escaped wherever it lands.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gxpo_conformance.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")


def page(**context: Any) -> str:
    matrix = context["matrix"]
    mutants = {m["id"] for m in matrix["mutants"]} if matrix else set()
    text = template().render(
        spec=SPEC_VERSION, legend=LEGEND, groups=GROUPS, allowed=ALLOWED, mutants=mutants, **context
    )
    return text.strip() + "\n"


NUMBERS = re.compile(r"\[[^\[\]{}]*\]")  # an array that holds no other


def case_text(case: dict[str, Any]) -> dict[str, Any]:
    """A case as indented JSON, each array of numbers on a line; no text where it is too long for a page."""
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(case, indent=1))
    return {"steps": len(case["steps"]), "kB": len(text) / 1000, "text": text if len(text) <= MOST_CASE else ""}


# ---- A run -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One clause: what is said of it, and its result in each dtype."""

    id: str
    level: str
    needs: list[str]
    rule: str
    cells: dict[str, str]  # dtype -> verdict, or ABSENT
    results: list[Record]

    @property
    def verdict(self) -> str:
        """The worst of the dtypes'."""
        return next((v for v in VERDICTS if v in self.cells.values()), NOT_RUN)

    def having(self, *verdicts: str) -> list[Record]:
        return [r for r in self.results if r["verdict"] in verdicts]


def by_clause(results: list[Record], dtypes: list[str]) -> list[Row]:
    """A row for every clause there is, those that the run left out among them."""
    rows = []
    for c in clauses().values():
        some = [r for r in results if r["clause"] == c.id]
        cells = {r["dtype"]: r["verdict"] for r in some if r["dtype"]}
        shown = {d: cells.get(d, ABSENT if cells else NOT_RUN) for d in dtypes}
        rows.append(Row(c.id, c.level, list(c.needs), c.rule, shown, [told(r) for r in some]))
    return rows


def told(r: Record) -> Record:
    """The result with what the page says of it in words."""
    finding = r.get("finding", {})
    tensor, at = finding.get("tensor"), finding.get("coordinate")
    where = r["message"]
    if tensor and "budgets" in finding:  # what follows are then place, numbers and budgets: they have columns
        where = where.partition(" differs: ")[0].rstrip(",")
    got, wanted = aligned(finding.get("got"), finding.get("wanted"))
    return {
        **dict.fromkeys(("known", "nearest", "rerun")),
        **r,
        "where": where,
        "place": f"{tensor}[{', '.join(map(str, at))}]" if at else tensor or "",
        "got": got,
        "wanted": wanted,
        "case": case_text(r["case"]) if r.get("case") else None,
        "off": off_by(finding),
    }


def story(row: Row, *verdicts: str) -> dict[str, Any]:
    """A clause that did not pass: dtypes that say the same say it once."""
    found: dict[str, list[Record]] = {}
    nearest: dict[str, list[Record]] = {}
    results = row.having(*verdicts)
    for r in results:
        found.setdefault(r["message"], []).append(r)
        if r["nearest"]:
            nearest.setdefault(r["nearest"]["id"], []).append(r)
    return {"row": row, "results": results, "found": list(found.values()), "nearest": list(nearest.values())}


def aligned(*numbers: float | str | None) -> list[str]:
    """As text, a minus sign in a column of its own."""
    texts = ["" if n is None else str(n) for n in numbers]
    signed = any(t.startswith("-") for t in texts)
    return [" " + t if signed and t and not t.startswith("-") else t for t in texts]


def off_by(finding: Record) -> str:
    budgets = finding.get("budgets")
    if isinstance(budgets, str):  # not finite: the value is none, or there is no budget
        return "not finite" if isinstance(finding["got"], str) else "has to be exact"
    return "" if budgets is None else f"{budgets:.3g}"


def about_run(head: Record, rows: list[Row], foot: Record) -> dict[str, Any]:
    """What the page says of a run."""
    return {
        "head": head,
        "foot": foot,
        "rows": rows,
        "tone": tone(foot, rows),
        "verdict": foot["words"].split(":")[0],
        "reason": reason(foot, rows),
        "unfolded": OPEN,
        "failed": [story(r, FAIL, ERROR) for r in rows if r.having(FAIL, ERROR)],
        "known": [story(r, KNOWN) for r in rows if r.having(KNOWN)],
        "idle": idle(rows),
        "counts": {v: (sum(r.verdict == v for r in rows), foot["counts"][v]) for v in LEGEND if v != ABSENT},
    }


def tone(foot: Record, rows: list[Row]) -> str:
    if foot["exit_status"] == 0:
        return KNOWN if any(r.having(KNOWN) for r in rows) else PASS
    return FAIL if foot["exit_status"] == 1 else NOT_RUN


def reason(foot: Record, rows: list[Row]) -> str:
    """The verdict in a sentence."""
    known = any(r.having(KNOWN) for r in rows)
    if foot["exit_status"] == 3:
        but = ", but for what is known to fail" if known else ""
        return f"Nothing failed{but}; yet not every MUST ran, so there is no verdict."
    if foot["exit_status"] != 0:
        failed = sum(bool(r.having(FAIL, ERROR)) for r in rows)
        return f"{failed} {'clause' if failed == 1 else 'clauses'} failed."
    if known:
        return "Nothing failed but what is listed as known to fail. That is not conformance."
    if not foot["options"]["declared"]:
        return "Every MUST ran and passed. The port declares no option."
    if foot["options"]["passed"] < foot["options"]["declared"]:
        return "Every MUST ran and passed; some of the options that the port declares did not run."
    return "Every MUST ran and passed, and so did every option that the port declares."


def idle(rows: list[Row]) -> list[tuple[str, str, list[str]]]:
    """(verdict, why, clauses) of what did not run, a line a reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reasons = [(r["verdict"], r["message"]) for r in row.having(BLOCKED, NOT_RUN)]
        if row.having(UNDECLARED):
            reasons.append((UNDECLARED, "options that the port does not declare"))
        if not row.results:
            reasons.append((NOT_RUN, "left out of this run"))
        for key in dict.fromkeys(reasons):
            found.setdefault(key, []).append(row.id)
    return [(*key, found[key]) for key in sorted(found, key=lambda key: VERDICTS.index(key[0]))]


# ---- The suite's own test --------------------------------------------------------------------------------------------


def about_matrix(matrix: dict[str, Any]) -> dict[str, Any]:
    """What the page says of the mutants."""
    order = list(clauses())
    mutants = [dict(m) for m in sorted(matrix["mutants"], key=lambda m: min(map(order.index, m["clauses"])))]
    for m in mutants:
        m["all"] = [c for c in order if any(c in some for some in m["kills"].values())]
        m["cells"] = {c: cell(c, m) for c in order}
    return {
        "mutants": mutants,
        "dtypes": [d for d in DTYPES if any(d in m["kills"] for m in mutants)],
        "killed": sum(bool(m["all"]) for m in mutants),
        "styles": {s: sum(m["style"] == s for m in mutants) for s in dict.fromkeys(m["style"] for m in mutants)},
        "problems": matrix.get("problems", []),  # the published one has none
        "suite": matrix.get("suite"),
        "rules": {c.id: c.rule for c in clauses().values()},
        "clauses": {c: sum(c in m["all"] for m in mutants) for c in clauses()},
        "alone": {c: ids for c in clauses() if (ids := [m["id"] for m in mutants if m["all"] == [c]])},
    }


SHORT = {"float64": "64", "float32": "32", "bfloat16": "b16"}


def cell(clause: str, mutant: dict[str, Any]) -> dict[str, Any] | None:
    """How a clause takes a mutant: `text` a sign where it rejects it in every dtype that can show it, else those in
    which it does."""
    due = clause in mutant["clauses"]
    shown = [d for d in DTYPES if d in mutant["kills"] and d in CHECKS[clause].dtypes]
    kills = [d for d in shown if clause in mutant["kills"][d]]
    if not kills:
        return {"kind": "missed", "text": ["✗"], "words": f"{clause} should reject it and does not"} if due else None
    text = ["●" if due else "○"] if kills == shown else [SHORT[d] for d in kills]
    return {
        "kind": "due" if due else "more",
        "text": text,
        "words": f"{clause} rejects {mutant['id']} in {', '.join(kills)}",
    }
