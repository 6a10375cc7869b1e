"""The page of a run: what it says first, and that it stays small enough to be sent and read, whatever fails."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from test_reports import Page

from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.mutants.nearest import matrix_file
from gxpo_conformance.protocol import DTYPES, Arrays, Config, Gradient, everything
from gxpo_conformance.reports.html import html, matrix_page
from gxpo_conformance.reports.record import Record, records
from gxpo_conformance.trial import judge

MOST = 200_000  # bytes
LONG = "<&\"'> is what it says " * 200


class Session:
    """Asks as often as it should not, where it should not, and keeps what it is given."""

    def __init__(self, params: Arrays) -> None:
        self.theta = params

    def step(self, grad: Gradient) -> None:
        for _ in range(4):
            self.theta = {k: (v + v.dtype.type(np.pi)).astype(v.dtype) for k, v in self.theta.items()}
            grad(self.params())

    def params(self) -> Arrays:
        return {k: v.copy() for k, v in self.theta.items()}

    def save(self) -> Arrays:
        return self.params()

    def load(self, saved: Arrays) -> None:
        self.theta = saved


class Port:
    name = "a port that fails everything"

    def capabilities(self) -> dict[str, Any]:
        return {**everything(), "devices": ["cpu"]}

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        return Session(params)


@pytest.fixture(scope="module")
def failing() -> list[Record]:
    """A result for every clause in three dtypes, all of them failures."""
    with pytest.MonkeyPatch.context() as patch:
        for clause, check in CHECKS.items():  # otherwise one failure would block the rest
            patch.setitem(CHECKS, clause, dataclasses.replace(check, leans=()))
        verdict = judge(Port())
    head, *found, foot = records(verdict, " --impl my_port:Port", 1.0)
    by_clause = {r["clause"]: r for r in found if r["verdict"] == "fail"}
    assert len(by_clause) > 0.9 * len(clauses())
    some = by_clause["MOV-01"]
    near = {
        "how": "looks like a known mistake",
        "id": "alpha-on-excess",
        "does": "applies alpha to q - 1",
        "source": "",
    }
    every = [
        {**by_clause.get(c.id, some), "clause": c.id, "rule": c.rule, "dtype": dtype, "nearest": near}
        for c in clauses().values()
        for dtype in DTYPES
    ]
    counts = {**dict.fromkeys(foot["counts"], 0), "fail": len(every)}
    return [head, *every, {**foot, "counts": counts, "results": len(every)}]


@pytest.fixture(scope="module")
def many_mutants() -> dict[str, Any]:
    mutants = matrix_file()["mutants"]
    more = [{**m, "id": f"{m['id']}-{n}"} for n in range(1 + 260 // len(mutants)) for m in mutants]
    return {**matrix_file(), "mutants": more[:260]}


def test_a_page_on_which_everything_fails_can_be_sent(failing: list[Record], many_mutants: dict[str, Any]) -> None:
    """A mail program would refuse it, a browser on a telephone give up, a reader as well."""
    text = html(failing, many_mutants)
    assert len(text.encode()) < MOST
    page = Page(text)
    assert {f"#{c}-why" for c in clauses()} <= set(page.all("href"))  # each failure is there, the later ones in short
    assert "gxpo-conformance repro" in page.words
    assert 1 <= len(page.pres) <= 2  # failing runs as JSON; a command writes the others


def test_no_port_makes_the_page_long(failing: list[Record], many_mutants: dict[str, Any]) -> None:
    """Whatever a port says at length, in each of 270 results, would be what its reader has to download."""
    head, *found, foot = failing
    found = [{k: v for k, v in r.items() if k != "finding"} | {"message": f"{n} {LONG}"} for n, r in enumerate(found)]
    causes = [{"what": LONG, "clauses": list(clauses()), "dtypes": list(DTYPES), "nearest": [], "hint": LONG}] * 50
    text = html([head, *found, {**foot, "causes": causes}], many_mutants)
    assert len(text.encode()) < MOST
    Page(text)


def test_the_suites_own_test_is_folded(failing: list[Record], many_mutants: dict[str, Any]) -> None:
    """Two hundred lines about other ports would stand where somebody reads about his own."""
    run, alone = (
        re.findall(r'<details class="more"( open)?>\s*<summary>Each mistake', text)
        for text in (html(failing, many_mutants), matrix_page(many_mutants))
    )
    assert run == [""]
    assert alone == [" open"]


def test_causes_stand_at_the_top(failing: list[Record]) -> None:
    """Eighty failures look like eighty mistakes where there is one."""
    cause = {
        "what": "asks at <theta0 + pi> in place of theta0",
        "clauses": list(clauses())[:12],
        "dtypes": ["float64"],
        "nearest": [{"how": "matches", "id": "far-off", "does": "adds `pi`", "source": ""}],
        "hint": "look at the first point",
        "blocked": ["TOY-01"],
    }
    *others, foot = failing
    words = Page(html([*others, {**foot, "causes": [cause]}], {})).words
    top = " ".join(words[: words.index("What failed\n")].split())
    for part in ("1 cause", cause["what"], "12 clauses in float64", "far-off: adds pi", cause["hint"], "; 1 blocked"):
        assert part in top, part
    without = Page(html([*others, {k: v for k, v in foot.items() if k != "causes"}], {}))
    assert "cause" not in without.words.split("What failed\n")[0]  # an old file of records has none


def test_a_score_by_group_stands_at_the_top(failing: list[Record]) -> None:
    head, *found, foot = failing
    passing = [{**r, "verdict": "pass" if r["clause"] in ("MOV-01", "MOV-02") else "fail"} for r in found]
    words = " ".join(Page(html([head, *passing, foot], {})).words.split())
    assert f"2 of {len(clauses())} clauses pass" in words
    assert re.search(r"MOV partial move \W+ 2 of 4", words)
    chosen = " ".join(Page(html([{**head, "only": ["MOV"]}, *passing, foot], {})).words.split())
    assert "2 of 4 clauses pass" in chosen
