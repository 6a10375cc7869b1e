"""Mutants by operators: what is made of a source, and what the suite says of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gxpo_reference
from gxpo_conformance.mutation import __main__ as command
from gxpo_conformance.mutation import judging
from gxpo_conformance.mutation.judging import CAUGHT, CRASHED, NOT_LOADED, SURVIVED, TIMED_OUT, judged
from gxpo_conformance.mutation.operators import Mutation, Subject, excluded_lines, mutations, sample, subjects

pytest.importorskip("universalmutator", reason="pip install 'gxpo[mutation]'")
PLAIN = Path(gxpo_reference.__file__).parent / "ports/plain.py"


def one_file(folder: Path, name: str, text: str) -> Subject:
    (folder / name).write_text(text, encoding="utf-8")
    return Subject("small", (folder / name,), ("float64",))


def made(subject: Subject, *left_out: dict) -> set[str]:
    return {m.mutated for m in mutations(subject, left_out)}


def mutation(subject: Subject, line: str, mutated: str) -> Mutation:
    for name, lines in subject.sources.items():
        for n, text in enumerate(lines, 1):
            if text.strip() == line:
                return Mutation(name, line, 0, mutated, n)
    raise ValueError(f"no line {line!r}")


def outcomes(subject: Subject, *changed: tuple[str, str], only: tuple[str, ...] = ("EST-01",)) -> list[str]:
    waiting = [mutation(subject, *each) for each in changed]
    found = {m: each["outcome"] for m, each in judged(subject, waiting, 1, only)}
    return [found[m] for m in waiting]


def test_operators_change_what_a_program_does_and_nothing_else(tmp_path: Path) -> None:
    """A mutant that only reads otherwise, or that is none, would pass every suite, or fail any."""
    subject = one_file(
        tmp_path,
        "small.py",
        '"""1 + 1"""\n\n\ndef f(theta0: int, theta1: int) -> int:\n    """Give 2 + 2."""\n'
        "    total = theta0 * theta1  # not 3 * 3\n    return total\n",
    )
    found = made(subject)
    assert {"total = theta0 + theta1  # not 3 * 3", "total = theta1 * theta1  # not 3 * 3"} <= found
    assert not [m for m in found if '"""' in m or "4 * 3" in m], "docstrings and comments are left alone"
    assert not [m for m in found if "break" in m], "a break outside of a loop is no program"
    assert not [m for m in found if "theta2" in m], "there is no such name in this file"


@pytest.mark.skipif(not shutil.which("node"), reason="node says what is a program in JavaScript")
def test_the_same_in_javascript(tmp_path: Path) -> None:
    text = "/** a + b. */\nexport function f(a0, a1) {\n  // a0 + a1\n  return a0 * a1; // a0 / a1\n}\n"
    found = made(one_file(tmp_path, "small.mjs", text))
    assert {"return a0 + a1; // a0 / a1", "return a1 * a1; // a0 / a1", "/*return a0 * a1; // a0 / a1*/"} <= found
    assert not [m for m in found if m.startswith(("//", "/*//", "/**"))], "comments are left alone"
    assert not [m for m in found if "break" in m], "a break outside of a loop is no program"


def test_what_is_left_out_is_the_block_and_no_more(tmp_path: Path) -> None:
    lines = ["def check(a,\n", "          b\n", ") -> None:\n", "    a + b\n", "\n", "c = 1 + 1\n", "d = 2\n"]
    assert excluded_lines("x.py", lines, [{"files": ["x.py"], "blocks": ["def check("]}]) == {1, 2, 3, 4, 5}
    assert excluded_lines("x.py", lines, [{"files": ["x.py"], "lines": ["c ="]}]) == {6}
    assert excluded_lines("x.py", lines, [{"files": ["y.py"], "lines": ["c ="]}]) == set()


def test_a_larger_sample_holds_a_smaller_one() -> None:
    """Otherwise what was judged for the one would be judged again, or thrown away, for the other."""
    made = [Mutation("x.py", f"line {n}", 0, "pass", n) for n in range(40)]
    small, large = sample(made, 10, 3), sample(made, 20, 3)
    assert large[:10] == small
    assert sample(made[1:], None, 3) == [m for m in sample(made, None, 3) if m is not made[0]]
    assert sample(made, 10, 4) != small
    assert sorted(m.number for m in sample(made, None, 3)) == list(range(40))


def test_the_lists_speak_of_lines_that_there_are() -> None:
    """An entry about a line that has changed leaves out nothing, or excuses a survivor that is another one now."""
    sources = {name: lines for subject in subjects().values() for name, lines in subject.sources.items()}
    for entry in command.listed()["excluded"]:
        assert entry["why"].strip()
        for kind in ("lines", "blocks"):
            for text in entry.get(kind, []):
                alone = [{"files": entry["files"], kind: [text]}]
                assert any(excluded_lines(name, sources[name], alone) for name in entry["files"]), text
    for entry in command.listed().get("equivalent", []):
        assert entry["why"].strip()
        there = {line.strip() for line in sources[entry["file"]]}
        for line, mutated in entry["mutations"]:
            assert line in there, line
            assert mutated != line


def test_a_wrong_port_is_caught_and_a_right_one_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not run, or does not come back, needs no suite to be found: it must not count as caught."""
    monkeypatch.setattr(judging, "REQUEST_LIMIT", 1.0)  # inherited: the processes are forked
    apply, keep = "self.optimizer.apply(second.given)", 'self.gate = Gate(config["gate"])'
    assert outcomes(
        Subject("plain", (PLAIN,), ("float64",)),
        ("before, after = first.given, second.given", "before, after = second.given, first.given"),
        (keep, keep + "  # and nothing else"),
        (apply, "raise RuntimeError"),
        (apply, "os._exit(3)" if "import os" in PLAIN.read_text() else "__import__('os')._exit(3)"),
        (apply, "while True: pass"),
        ("class Port:", "class Harbour:"),
    ) == [CAUGHT, SURVIVED, CRASHED, CRASHED, TIMED_OUT, NOT_LOADED]


def test_the_changed_oracle_is_judged_by_the_unchanged_one() -> None:
    """Judged by itself it would always be right."""
    line = "theta_ = per_tensor(lambda t0, tK: t0 + alpha * (tK - t0), theta0, thetaK)"
    wrong = "theta_ = per_tensor(lambda t0, tK: t0 + (tK - t0), theta0, thetaK)"
    gate = "z = (h - baseline[0]) / (baseline[1] + 1e-9)"  # of the other file
    found = outcomes(subjects()["oracle"], (line, wrong), (gate, "z = 0.0"), only=("MOV-01", "GAT-01"))
    assert found == [CAUGHT, CAUGHT]


@pytest.mark.skipif(not shutil.which("node"), reason="the port needs node")
def test_the_javascript_port_is_judged_from_its_copy() -> None:
    line = "const scaled = combine(q, displacement, (qi, d) => this.config.alpha * qi * d);"
    assert outcomes(subjects()["javascript"], (line, line.replace(" * qi", ""))) == [CAUGHT]


def test_what_is_done_is_not_done_again_and_what_is_excused_is_no_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of an hour has to go on where it was ended, and a survivor without a reason has to be seen."""
    subject = Subject("plain", (PLAIN,), ("float64",))
    line, same = "theta0, s0 = before", "(theta0, s0) = before"
    tried = [mutation(subject, line, "s0, theta0 = before"), mutation(subject, line, same)]
    lists = {"excluded": [], "equivalent": []}
    monkeypatch.setattr(command, "subjects", lambda: {"plain": subject})
    monkeypatch.setattr(command, "mutations", lambda *_: tried)
    monkeypatch.setattr(command, "listed", lambda: lists)
    figures = tmp_path / "figures.json"
    said: list[str] = []

    def run(*more: str) -> tuple[int, str]:
        said.clear()
        where = ["--work", str(tmp_path / "work"), "--json", str(figures)]
        return command.main(["plain", "--only", "MOV-01", *where, *more], said.append), "\n".join(said)

    status, text = run()
    assert status == 1
    assert "2 to judge" in text
    assert f"+   {same}" in text
    assert "0 caught, 1 survived, 0 equivalent, 1 crashed" in text
    lists["equivalent"] = [{"file": "plain.py", "why": "brackets", "mutations": [[line, same]]}]
    status, text = run()
    assert status == 0
    assert "0 to judge" in text
    assert "0 caught, 0 survived, 1 equivalent, 1 crashed" in text
    assert "1 to judge" in run("--again")[1], "what survived may be judged once more, by a better suite"
    assert not figures.exists(), "figures are of the whole suite, not of one clause"


def test_the_published_figures_are_of_the_sources_as_they_are() -> None:
    """Published shares of a source that has changed since are of another program: run the command again."""
    figures = json.loads((command.HERE / "figures.json").read_text(encoding="utf-8"))
    assert set(figures) == set(subjects())
    for name, found in figures.items():
        assert found["source"] == subjects()[name].version, name
        assert found["judged"] == sum(found[o] for o in command.OUTCOMES)
        assert found["survived"] == len(found["survivors"])
