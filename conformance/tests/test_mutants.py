"""The suite is tested by wrong implementations: gxpo-conformance selftest runs them all, these are about the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gxpo_conformance import cli
from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.mutants import MUTANTS, Mutant, correct, selftest
from gxpo_conformance.mutants.model import Functional
from gxpo_conformance.mutants.nearest import Nearest, matrix
from gxpo_conformance.protocol import DTYPES
from gxpo_conformance.trial import judge


@pytest.mark.parametrize("port", correct(), ids=lambda port: port.name)
def test_the_models_that_mutants_are_made_from_are_right(port: Any) -> None:
    """A mutant of a wrong model proves nothing about the one mistake that it is about."""
    assert judge(port).exit_status == 0


def test_there_are_mutants_about_every_clause_and_in_both_styles() -> None:
    """A clause that no known mistake breaks may be a clause that checks nothing."""
    assert {c for m in MUTANTS.values() for c in m.clauses} == set(clauses())
    styles = [m.style for m in MUTANTS.values()]
    assert len(styles) >= 60
    assert min(styles.count("functional"), styles.count("in place")) >= 30


def test_a_mutant_says_what_it_does_and_is_one_mistake_of_its_own() -> None:
    assert len({m.does for m in MUTANTS.values()}) == len(MUTANTS)
    assert sum(bool(m.source) for m in MUTANTS.values()) >= 7


def test_the_published_matrix_is_of_these_mutants_and_clauses() -> None:
    """It is what `matches a known mistake` is looked up in."""
    assert set(matrix()) == set(MUTANTS)
    for mutant in MUTANTS.values():
        kills = matrix()[mutant.id]
        assert set(kills) == set(DTYPES)
        for dtype in ("float64", "float32"):
            due = {c for c in mutant.clauses if dtype in CHECKS[c].dtypes}
            assert due <= set(kills[dtype]), f"{mutant.id} in {dtype}"


@pytest.mark.parametrize(
    "name", ["closed-form", "window-holds-its-own-value", "resume-re-arms", "exception-leaves-state"]
)
def test_a_row_of_the_matrix_is_what_the_suite_says(name: str) -> None:
    found = selftest.judged(name, "float64")
    assert sorted(found["kills"]) == sorted(matrix()[name]["float64"])
    assert selftest.wrong_with(found) == []


class Harmless(Functional):
    """A mutant that is none."""


class Crashing(Functional):
    def move(self, *given: Any) -> Any:
        return super().move(*given) if self.config["alpha"] == 1 else 1 / 0


@pytest.mark.parametrize(("kind", "why"), [(Harmless, "passes it"), (Crashing, "it crashed")])
def test_a_mutant_that_survives_or_crashes_is_a_problem(kind: type, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash is not a kill: the clause did not compare anything."""
    monkeypatch.setitem(MUTANTS, "new", Mutant("new", "does nothing new", ("MOV-01",), "", kind))
    wrong = selftest.wrong_with(selftest.judged("new", "float64"))
    assert len(wrong) == 1
    assert "MOV-01" in wrong[0]
    assert why in wrong[0]


def test_a_clause_that_rejects_nothing_is_a_problem() -> None:
    rows = {m.id: {"margins": {d: dict.fromkeys(m.clauses, float("inf")) for d in DTYPES}} for m in MUTANTS.values()}
    assert selftest.idle_clauses(rows) == []
    for m in MUTANTS.values():
        rows[m.id]["margins"]["float32"].pop("EXT-03", None)
    assert selftest.idle_clauses(rows) == ["EXT-03 in float32 rejects no mutant that is about it by 10, only by 0"]


@pytest.mark.parametrize("name", ["alpha-on-excess", "sample-deviation", "even-powers-only", "failed-step-keeps-state"])
def test_a_mistake_is_recognised(name: str) -> None:
    """The author should read what was done, not only that a number is off."""
    clause = MUTANTS[name].clauses[0]
    verdict = judge(MUTANTS[name].port(), ["float64"])
    nearest = Nearest(verdict).of(verdict.results[clause]["float64"])
    assert nearest is not None
    assert nearest.id == name


def test_selftest_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a handful of mutants: what it prints, writes and returns."""
    some = {name: MUTANTS[name] for name in ("alpha-on-excess", "closed-form")}
    monkeypatch.setattr(selftest, "MUTANTS", some)
    assert cli.main(["selftest", "--json", str(tmp_path / "m.json"), "--html", str(tmp_path / "m.html")]) == 1
    printed = capsys.readouterr().out
    assert "2/2 wrong implementations rejected (2 functional, 0 in place)" in printed
    assert "GAT-02 in float64 rejects no mutant that is about it" in printed
    made = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert [m["id"] for m in made["mutants"]] == list(some)
    assert "MOV-02" in made["mutants"][0]["kills"]["float64"]
    assert "alpha-on-excess" in (tmp_path / "m.html").read_text(encoding="utf-8")


def test_one_mutant_can_be_tried_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes one would wait two minutes for all the others, every time."""
    assert cli.main(["selftest", "sum-to-k"]) == 0
    printed = capsys.readouterr().out
    assert "1/1 wrong implementations rejected" in printed
    assert "not as published" not in printed
    for arguments, why in ((["no-such"], "no mutant 'no-such'"), (["sum-to-k", "--json", "f"], "of all mutants")):
        with pytest.raises(SystemExit):
            cli.main(["selftest", *arguments])
        assert why in capsys.readouterr().err
