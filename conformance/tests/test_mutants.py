"""The suite is tested by wrong implementations: gxpo-conformance selftest runs them all, these are about the run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from gxpo_conformance import cli
from gxpo_conformance.clauses.table import CHECKS, GROUPS, clauses
from gxpo_conformance.mutants import MUTANTS, Mutant, correct, nearest, selftest
from gxpo_conformance.mutants.model import Functional, ModelPort
from gxpo_conformance.mutants.nearest import Nearest, Seen, matrix, same, seen
from gxpo_conformance.protocol import DTYPES, Arrays
from gxpo_conformance.trial import Verdict, judge


@pytest.mark.parametrize("port", correct()[:2], ids=lambda port: port.name)
def test_the_models_that_mutants_are_made_from_are_right(port: Any) -> None:
    """A mutant of a wrong model proves nothing about the one mistake that it is about."""
    assert judge(port).exit_status == 0


@pytest.mark.parametrize("port", correct()[2:], ids=lambda port: port.name)
def test_what_the_rules_leave_open_is_not_rejected(port: Any) -> None:
    """Whoever has a right port and reads that it is wrong never trusts the suite again. (The random runs: selftest.)"""
    verdict = judge(port, only=port.about)
    assert verdict.failed == []
    assert verdict.which("pass")


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
            due = {c for c in mutant.clauses if dtype in CHECKS[c].dtypes and dtype in mutant.shows}
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


# ---- Names for what fails --------------------------------------------------------------------------------------------

FIXED = [group for group in GROUPS if group not in ("TOY", "RND")]
RECOGNISED = ["alpha-on-excess", "odd-term-undivided", "even-powers-only", "failed-step-keeps-state"]


@functools.cache
def judged_once(name: str) -> Verdict:
    return judge(MUTANTS[name].port(), ["float64"], only=FIXED)


class TwoMistakes(Functional):
    """alpha-on-excess, and a clipping that no mutant has."""

    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        alpha = self.config["alpha"]
        return {k: t + (1 + alpha * (q[k] - 1)) * (theta[2][k] - t) for k, t in theta[0].items()}

    def coefficient(self, norm: float) -> float:
        return super().coefficient(2 * norm)


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_mistake_is_recognised(name: str) -> None:
    """The author should read what was done, not only that numbers are off, and read it once."""
    verdict = judged_once(name)
    (guess,) = Nearest(verdict).guesses
    assert guess.mutants == (MUTANTS[name],)
    assert guess.words == f"matches a known mistake: {MUTANTS[name].does} ({name})"
    assert {c for c, _ in guess.explains} == set(verdict.failed)


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_mistake_that_nobody_knows_has_no_name(name: str) -> None:
    """Others share its first wrong number: whoever is sent after one of them looks in the wrong place."""
    assert Nearest(judged_once(name), without=[name]).guesses == []


def test_counts_of_one_clause_name_nothing() -> None:
    """A gate that trips a step late does so by a dozen mistakes."""
    verdict = judged_once("sample-deviation")
    assert verdict.failed
    assert Nearest(verdict).guesses == []


def test_numbers_that_agree_at_first_only_do_not_match() -> None:
    """Two mistakes that begin alike would be taken for one another."""
    name, clause = "alpha-on-excess", "MOV-02"
    result = judged_once(name).results[clause]["float64"]
    assert result.finding
    own = seen(result.finding, result.talk)
    assert same(own, own, "float64")
    last = own.asked[-1][-1]
    elsewhere = {k: v + 1e-6 * (v != result.finding.got) for k, v in last.items()}
    other = Seen(own.finding, [*own.asked[:-1], [*own.asked[-1][:-1], elsewhere]])
    assert not same(own, other, "float64")
    fewer = Seen(own.finding, [*own.asked[:-1], own.asked[-1][:-1]])
    assert not same(own, fewer, "float64")


def test_a_part_of_what_fails_is_not_a_match() -> None:
    """ "Matches" would say that nothing else is wrong, and the second mistake would be looked for in the first."""
    verdict = judge(ModelPort(TwoMistakes, "two"), ["float64"], only=FIXED)
    (guess,) = Nearest(verdict).guesses
    assert guess.how == "looks like a known mistake"
    assert [m.id for m in guess.mutants] == ["alpha-on-excess"]
    assert Nearest(verdict).of(verdict.results["MOV-02"]["float64"]) == guess
    assert verdict.of("CLP-01") == "fail"
    assert Nearest(verdict).of(verdict.results["CLP-01"]["float64"]) is None


def test_one_clause_is_no_match_either() -> None:
    """Most mistakes share all the numbers of some clause with another."""
    verdict = judge(MUTANTS["alpha-on-excess"].port(), ["float64"], only=["MOV-02"])
    assert [(g.how, [m.id for m in g.mutants]) for g in Nearest(verdict).guesses] == [
        ("looks like a known mistake", ["alpha-on-excess"])
    ]


def test_the_search_for_a_name_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that fails everything would keep its author waiting for the report."""
    monkeypatch.setattr(nearest, "TIME", 0.0)
    assert Nearest(judged_once("even-powers-only")).guesses == []


def test_selftest_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a handful of mutants: what it prints, writes and returns."""
    some = {name: MUTANTS[name] for name in ("alpha-on-excess", "closed-form")}
    monkeypatch.setattr(selftest, "MUTANTS", some)
    monkeypatch.setattr(selftest, "correct", lambda: [])
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
