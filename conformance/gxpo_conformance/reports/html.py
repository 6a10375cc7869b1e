"""The run as one page that needs nothing else: no script, no font, no address to fetch from."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2
import markupsafe

from gxpo_conformance.clauses.table import CHECKS, GROUPS, SPEC_VERSION, clauses
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.protocol import DTYPES
from gxpo_conformance.reports.record import Record, legible, on_a_line
from gxpo_conformance.reports.score import candidates, scores, total
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, KNOWN, NOT_RUN, PASS, UNDECLARED, VERDICTS

# The page stays under 200 kB, whatever fails: a mail program takes it, and a reader as well.
MOST_TOLD = 8  # failures told in full; what one mistake does to forty clauses need not be read forty times
MOST_SAID = 800  # bytes of one message there, as it stands on the page
MOST_IN_SHORT = 160  # of the others
MOST_OF_A_LINE = 400  # of what else has a line
MOST_CAUSES = 6
MOST_RUNS = 2  # failing runs on the page as JSON, of MOST_CASE characters at most; a command writes the others
MOST_CASE = 8000
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
    title = f"{head['port']}: {heading(foot)}"
    return page(title=title, run=about_run(records, rows), matrix=about_matrix(matrix) if matrix else None)


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
        spec=SPEC_VERSION,
        legend=LEGEND,
        groups=GROUPS,
        allowed=ALLOWED,
        mutants=mutants,
        line=lambda text: within(on_a_line(text), MOST_OF_A_LINE),
        short=lambda text: within(on_a_line(text), MOST_IN_SHORT),
        **context,
    )
    return text.strip() + "\n"


def within(text: str, most: int) -> str:
    """`text`, its middle left out where it would take more than `most` bytes of a page: an ampersand takes five."""
    characters = most
    while len(str(markupsafe.escape(made := legible(text, characters))).encode()) > most and characters > 20:
        characters = 3 * characters // 4
    return made


NUMBERS = re.compile(r"\[[^\[\]{}]*\]")  # an array that holds no other


def case_text(case: dict[str, Any]) -> dict[str, Any]:
    """A case as indented JSON, each array of numbers on a line."""
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(case, indent=1))
    return {"steps": len(case["steps"]), "kB": len(text) / 1000, "text": text}


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
        **dict.fromkeys(("known", "rerun", "run", "hint")),
        **r,
        "nearest": candidates(r),
        "where": where,
        "place": f"{tensor}[{', '.join(map(str, at))}]" if at else tensor or "",
        "got": got,
        "wanted": wanted,
        "off": off_by(finding),
    }


def story(row: Row, *verdicts: str) -> dict[str, Any]:
    """A clause that did not pass: dtypes that say the same say it once."""
    found: dict[str, list[Record]] = {}
    nearest: dict[str, dict[str, Any]] = {}
    results = row.having(*verdicts)
    for r in results:
        found.setdefault(r["message"], []).append(r)
        for near in r["nearest"]:
            nearest.setdefault(near["id"], {**near, "dtypes": []})["dtypes"].append(r["dtype"])
    for same in found.values():
        same[0]["said"] = within(same[0]["where"], MOST_SAID)
    return {"row": row, "results": results, "found": list(found.values()), "nearest": list(nearest.values())}


def with_runs(stories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first failing runs as text, to be played again; a command writes the others."""
    left = MOST_RUNS
    for told in stories:
        told["cases"] = []
        for r in told["results"]:
            case = case_text(r["case"]) if left and r.get("case") else None
            if case and len(case["text"]) <= MOST_CASE:
                told["cases"].append({"dtype": r["dtype"], **case})
                left -= 1
    return stories


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


def about_run(records: list[Record], rows: list[Row]) -> dict[str, Any]:
    """What the page says of a run."""
    head, *_, foot = records
    groups = scores(records)
    stories = [story(r, FAIL, ERROR) for r in rows if r.having(FAIL, ERROR)]
    known = [story(r, KNOWN) for r in rows if r.having(KNOWN)]
    with_runs([*stories, *known][:MOST_TOLD])
    causes = foot.get("causes") or []
    return {
        "head": head,
        "foot": foot,
        "rows": rows,
        "tone": tone(foot, rows),
        "verdict": heading(foot),
        "reason": reason(foot, rows),
        "failed": stories[:MOST_TOLD],
        "also_failed": stories[MOST_TOLD:],
        "known": known[: max(0, MOST_TOLD - len(stories))],
        "also_known": known[max(0, MOST_TOLD - len(stories)) :],
        "causes": [{"nearest": [], "hint": None, "blocked": [], **c} for c in causes[:MOST_CAUSES]],
        "more_causes": causes[MOST_CAUSES:],
        "scores": groups,
        "score": total(groups),
        "idle": idle(rows),
        "counts": {v: (sum(r.verdict == v for r in rows), foot["counts"][v]) for v in LEGEND if v != ABSENT},
    }


def heading(foot: Record) -> str:
    """The verdict, without the clauses and whatever else is said of it."""
    return re.split("[:;]", foot["words"])[0]


def tone(foot: Record, rows: list[Row]) -> str:
    if foot["exit_status"] == 0:
        return KNOWN if any(r.having(KNOWN) for r in rows) else PASS
    if foot["exit_status"] == 1:
        return FAIL if any(r.having(FAIL) for r in rows) else ERROR
    return NOT_RUN


def reason(foot: Record, rows: list[Row]) -> str:
    """The verdict in a sentence."""
    known = any(r.having(KNOWN) for r in rows)
    if foot["exit_status"] == 3:
        but = ", but for what is known to fail" if known else ""
        return f"Nothing failed{but}; yet not every MUST ran, so there is no verdict."
    if foot["exit_status"] != 0:
        failed, stale = (sum(bool(r.having(v)) for r in rows) for v in (FAIL, ERROR))
        parts = [f"{failed} {'clause' if failed == 1 else 'clauses'} failed."] if failed else ["Nothing failed."]
        if stale:
            what = "clause passes that is" if stale == 1 else "clauses pass that are"
            parts.append(f"{stale} {what} listed as known to fail: take them off the list.")
        return " ".join(parts) if failed or stale else "Nothing failed of what ran; the rest did not run."
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
        m["due"] = run_together([(c, *marked(c, m)) for c in order if c in m["clauses"]])
        m["more"] = run_together([(c, *marked(c, m)) for c in m["all"] if c not in m["clauses"]])
    return {
        "mutants": mutants,
        "dtypes": [d for d in DTYPES if any(d in m["kills"] for m in mutants)],
        "killed": sum(bool(m["all"]) for m in mutants),
        "styles": {s: sum(m["style"] == s for m in mutants) for s in dict.fromkeys(m["style"] for m in mutants)},
        "problems": matrix.get("problems", []),  # the published one has none
        "suite": matrix.get("suite"),
        "alone": {c: ids for c in clauses() if (ids := [m["id"] for m in mutants if m["all"] == [c]])},
    }


SHORT = {"float64": "64", "float32": "32", "bfloat16": "b16"}


def marked(clause: str, mutant: dict[str, Any]) -> tuple[str, str]:
    """How a clause takes a mutant: a sign before it where it should reject it and does not, the dtypes behind it where
    it rejects it in some alone of those that can show it."""
    shown = [d for d in DTYPES if d in mutant["kills"] and d in CHECKS[clause].dtypes]
    kills = [d for d in shown if clause in mutant["kills"][d]]
    if not kills:
        return LEGEND[FAIL][0], ""
    return "", "" if kills == shown else f" ({', '.join(SHORT[d] for d in kills)})"


def run_together(found: list[tuple[str, str, str]]) -> str:
    """(clause, sign, dtypes) as "EXT-01, 02; INV-03 (64)": two hundred lines of them are read, and sent."""
    text, group = "", ""
    for clause, sign, dtypes in found:
        same = clause[:3] == group
        text += (", " if same else "; " if text else "") + sign + (clause[4:] if same else clause) + dtypes
        group = clause[:3]
    return text
