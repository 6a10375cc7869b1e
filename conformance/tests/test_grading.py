"""Marks: what a clause is worth, what earns it, and results.json as Gradescope takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gxpo_conformance import cli
from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.points import Points, read_points
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.reports.gradescope import gradescope
from gxpo_conformance.reports.record import Record
from gxpo_conformance.reports.score import score_lines

MUST = [c.id for c in clauses().values() if c.level == "MUST"]

# https://gradescope-autograders.readthedocs.io/en/latest/specs/, "Output format"; nothing else is allowed, so that a
# misspelt key is found here and not by a lecturer.
VISIBILITY = {"enum": ["hidden", "after_due_date", "after_published", "visible"]}
FORMAT = {"enum": ["text", "html", "simple_format", "md", "ansi"]}
POINTS = {"type": "number", "minimum": 0}
TEST = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "max_score", "name", "status", "output", "visibility"],
    "properties": {
        "score": POINTS,
        "max_score": POINTS,
        "status": {"enum": ["passed", "failed"]},
        "name": {"type": "string", "minLength": 1},
        "name_format": FORMAT,
        "number": {"type": "string", "pattern": r"^\d+(\.\d+)*$"},
        "output": {"type": "string"},
        "output_format": FORMAT,
        "tags": {"type": "array", "items": {"type": "string"}},
        "visibility": VISIBILITY,
        "extra_data": {"type": "object"},
    },
}
RESULTS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "tests", "output", "stdout_visibility"],
    "properties": {
        "score": POINTS,
        "execution_time": {"type": "integer", "minimum": 0},
        "output": {"type": "string", "minLength": 1},
        "output_format": FORMAT,
        "test_output_format": FORMAT,
        "test_name_format": FORMAT,
        "visibility": VISIBILITY,
        "stdout_visibility": VISIBILITY,
        "extra_data": {"type": "object"},
        "tests": {"type": "array", "items": TEST, "minItems": 1},
        "leaderboard": {"type": "array"},
    },
}


def valid(text: str) -> dict[str, Any]:
    found = json.loads(text, parse_constant=pytest.fail)
    jsonschema.validate(found, RESULTS)
    return found


def toml(folder: Path, text: str) -> str:
    (folder / "points.toml").write_text(text, encoding="utf-8")
    return str(folder / "points.toml")


def run_of(*results: tuple[str, str | None, str], only: tuple[str, ...] = ()) -> list[Record]:
    """(clause, dtype, verdict): the records of a run, as far as marks go."""
    made = [
        {"record": "result", "clause": c, "dtype": d, "verdict": v, "message": f"{c} is <{v}>", "rule": ""}
        for c, d, v in results
    ]
    head = {"record": "header", "port": "p", "dtypes": ["float64", "float32"], "only": list(only), "versions": {}}
    return [head, *made, {"record": "footer", "words": "incomplete", "seconds": 0.4}]


def scores(records: list[Record], points: Points) -> dict[str, float]:
    return {t["name"][:6]: t["score"] for t in valid(gradescope(records, points))["tests"]}


def test_a_clause_earns_its_points_in_every_dtype_that_ran() -> None:
    """Half of a clause would be marked as all of it; or what a dtype cannot show would cost points."""
    points = Points({"EST-01": 1.0, "EST-02": 2.0, "EST-03": 4.0, "EXT-01": 8.0, "EXT-02": 16.0, "EXT-03": 32.0})
    found = run_of(
        ("EST-01", "float64", "pass"),
        ("EST-01", "float32", "pass"),
        ("EST-02", "float64", "pass"),
        ("EST-02", "float32", "fail"),
        ("EST-03", "float64", "pass"),  # float32 cannot show it
        ("EXT-01", "float64", "blocked"),
        ("EXT-02", None, "not run"),
    )  # EXT-03 was not reached
    assert scores(found, points) == {"EST-01": 1, "EST-02": 0, "EST-03": 4, "EXT-01": 0, "EXT-02": 0, "EXT-03": 0}
    made = valid(gradescope(found, points))
    assert made["score"] == 5
    told = {t["name"][:6]: t["output"] for t in made["tests"]}
    assert "float32: fail\nEST-02 is <fail>" in told["EST-02"]
    assert told["EXT-03"] == "not run: the run ended before it"


def test_marks_without_a_file_are_one_for_each_must() -> None:
    assert read_points(None).worth == dict.fromkeys(MUST, 1.0)


def test_what_an_exercise_is_worth_does_not_depend_on_what_a_port_declares(tmp_path: Path) -> None:
    """Whoever declares nothing would get full marks for less."""
    points = read_points(toml(tmp_path, 'required = ["ATM"]\n[groups]\nATM = 3\n'))
    assert {c: p for c, p in points.worth.items() if c not in MUST} == dict.fromkeys(
        (c for c in clauses() if c.startswith("ATM")), 3
    )
    found = run_of(("ATM-01", "float64", "undeclared"), ("EST-10", "float64", "pass"))
    assert sum(scores(found, points).values()) == 0  # EST-10 passes, and is no part of the exercise


def test_points_come_from_the_nearest_line_and_sum_to_the_total(tmp_path: Path) -> None:
    path = toml(tmp_path, "total = 100\ndefault = 2\n[groups]\nEXT = 4\nGAT = 0\n[clauses]\nEXT-05 = 8\n")
    points = read_points(path)
    assert points.worth["EXT-05"] == pytest.approx(2 * points.worth["EXT-04"])
    assert points.worth["EXT-04"] == pytest.approx(2 * points.worth["EST-01"])
    assert "GAT-01" not in points.worth
    assert points.all == pytest.approx(100)
    found = run_of(*((c, "float64", "pass") for c in points.worth))
    assert valid(gradescope(found, points))["score"] == 100  # not 99.9997, with which nobody has full marks
    some = read_points(path, ["EST", "EXT-05"])
    assert some.worth == pytest.approx({"EST-01": 100 / 7, "EST-02": 100 / 7, "EST-03": 100 / 7, "EXT-05": 400 / 7})


def test_hidden_clauses_are_not_told_of_elsewhere(tmp_path: Path) -> None:
    """Students would learn before the due date what is kept for after it."""
    points = read_points(toml(tmp_path, 'hidden = ["MOV-01"]\nvisibility = "after_published"\n'), ["MOV"])
    leans = ("MOV-02", "float64", "blocked")
    found = run_of(("MOV-01", "float64", "fail"), leans)
    found[2]["message"] = "leans on MOV-01, which did not pass"
    made = valid(gradescope(found, points))
    assert made["stdout_visibility"] == "hidden"
    by = {t["name"][:6]: t for t in made["tests"]}
    assert [c for c, t in by.items() if t["visibility"] != "visible"] == ["MOV-01"]
    assert by["MOV-01"]["visibility"] == "after_published"
    shown = made["output"] + "".join(t["output"] for t in made["tests"] if t["visibility"] == "visible")
    assert "MOV-01 is <fail>" not in shown
    assert "0 of 3 clauses earn" in made["output"]


def test_what_is_in_the_way_is_told_where_it_is_no_test_itself() -> None:
    """Twenty tests "lean on OPT-01", and nobody is told what is wrong with it."""
    found = run_of(("OPT-01", "float64", "fail"), ("EST-01", "float64", "blocked"))
    found[2]["message"] = "leans on OPT-01, which did not pass"
    (test,) = valid(gradescope(found, Points({"EST-01": 1.0})))["tests"]
    assert "OPT-01 is <fail>" in test["output"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("totl = 3", "no key 'totl'; did you mean 'total'?"),
        ("total = 0", "total must be a number > 0, got 0"),
        ("default = -1", "default must be a number of points from 0 to 1e+06, got -1"),
        ("default = nan", "got nan"),
        ("default = true", "got True"),
        ("[clauses]\nEXT-05 = inf", "[clauses] EXT-05 must be a number of points from 0 to 1e+06, got inf"),
        ("[clauses]\nEXT-5 = 1", "no clause 'EXT-5'; did you mean 'EXT-05'?"),
        ("[clauses]\nCLP-01 = 1", "[clauses] CLP-01 is an option: it counts only where required lists it, too"),
        ("[groups]\nEXP = 1", "no group 'EXP'; did you mean 'EXT'?"),
        ("[groups]\nCLP = 1", "[groups] CLP has options alone: they count only where required lists them"),
        ("[[groups]]\nCLP = 1", "groups must be a table, [groups]"),
        ('required = "CLP"', "required must be a list of clauses and groups"),
        ('hidden = ["TOYS"]', "hidden: no clause or group 'TOYS'; did you mean 'TOY'?"),
        ('visibility = "hidden"', "visibility must be one of after_due_date, after_published, got 'hidden'"),
        ("default = 0", "no clause is worth a point"),
        ("total = ", "Invalid value"),
    ],
)
def test_a_slip_of_the_lecturer_ends_the_command_before_the_run(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A course would be marked with 0 by a misspelt word, and not know."""
    results = tmp_path / "results.json"
    command = ["--impl", "no_such_module:Port", "--points", toml(tmp_path, text), "--gradescope", str(results)]
    assert cli.main(command) == 2
    assert says in capsys.readouterr().err
    assert not results.exists()


def test_points_for_nothing_that_runs_are_refused() -> None:
    with pytest.raises(AdapterError, match="no clause of CLP is worth a point. Options count where"):
        read_points(None, ["CLP"])


def test_the_score_counts_what_is_no_failure_apart() -> None:
    """ "0 of 14" would be read as fourteen mistakes where one stands in the way of the rest."""
    est = ("pass", "fail", "blocked", "undeclared", "known-fail", "not run")
    numbers = [c for c in clauses() if c.startswith("EST")][: len(est)]
    found = run_of(*((c, "float64", v) for c, v in zip(numbers, est, strict=True)), only=("EST", "EXT-06"))
    lines = score_lines(found)
    asked = len([c for c in clauses() if c.startswith("EST")]) - 1
    assert lines[0].startswith(f"EST  1 of {asked} clauses pass; 1 fails: EST-02; 1 is known to fail: EST-10; ")
    for part in ("1 is blocked: EST-03", "did not run: EST-11, ", "1 is an option that the port does not declare"):
        assert part in lines[0]
    assert lines[1] == "EXT  0 of 1 clause passes; 1 did not run: EXT-06"
    assert lines[2].startswith(f"all  1 of {asked + 1} clauses pass (")
    assert score_lines(run_of(("EST-01", "float64", "pass"))) == []  # the headline says it where all ran


def test_known_failures_do_not_go_with_marks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--gradescope", "x.json", "--known", "k.toml"])
    assert "--known does not go with" in capsys.readouterr().err
