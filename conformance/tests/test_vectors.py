"""The vectors: true to the oracle and to their schemas, each far from every known mistake, ids for good."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import gxpo
from gxpo_conformance import cli
from gxpo_conformance.adapters import torch as torch_adapter
from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.case import replay
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.mutants.right import RightPort, correct
from gxpo_conformance.protocol import everything
from gxpo_conformance.runs.play import has_runs
from gxpo_conformance.stored import missing
from gxpo_conformance.vectors import files as vectors
from gxpo_conformance.vectors.cases import ABOUT_ARRAYS, ABOUT_SEVERAL_RUNS, KINDS, WHOLE_RUNS, make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, to be changed."""
    for path in vectors.FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(vectors, "FOLDER", tmp_path)
    return tmp_path


def change(folder: Path, kind: str, at: int, **fields: Any) -> None:
    made = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
    made["cases"][at].update(fields)
    (folder / f"{kind}.json").write_text(json.dumps(made), encoding="utf-8")


def test_the_files_are_what_the_oracle_gives(capsys: pytest.CaptureFixture[str]) -> None:
    """People who test against a wrong file make their port wrong."""
    assert vectors.check() == 0, capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_follow_their_schemas(kind: str) -> None:
    schema = json.loads((vectors.FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(vectors.read(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_refuses_what_proves_nothing(kind: str) -> None:
    """A schema that takes everything checks nothing."""
    schema = json.loads((vectors.FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    for wrong in ({"margin": 9.5}, {"nearest": None}, {"clause": "EXT"}, {"colour": "red"}):
        file = vectors.read(kind)
        file["cases"] = [{**file["cases"][0], **wrong}]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(file, schema)


def test_every_case_has_a_clause_an_id_of_its_own_and_a_known_mistake_far_away() -> None:
    cases = [case for kind in KINDS for case in vectors.load(kind)]
    assert len({case["id"] for case in cases}) == len(cases) > 150
    assert all(case["clause"] in clauses() and case["nearest"] in MUTANTS for case in cases)
    assert not any(vectors.unfit(case["margin"]) for case in cases)


def test_every_clause_that_one_run_can_show_is_in_the_files() -> None:
    """Whoever can use the files alone should miss no more than has to be missed."""
    found = {case["clause"] for kind in KINDS for case in vectors.load(kind)}
    left_out = {c for c in clauses() if c.startswith(WHOLE_RUNS) or c in ABOUT_SEVERAL_RUNS + ABOUT_ARRAYS}
    left_out |= {c for c in clauses() if "float64" not in CHECKS[c].dtypes} | {"EXT-06"}  # no step is made
    assert set(clauses()) - found == left_out


def test_most_clauses_that_have_awkward_runs_have_some_in_the_file() -> None:
    """Fixed cases vary one thing at a time: a port that is right in each may be wrong where two meet."""
    runs = vectors.load("run")
    able = {c for c in clauses() if has_runs(c) and not c.startswith(WHOLE_RUNS) and c not in ABOUT_ARRAYS}
    assert {case["clause"] for case in runs} <= able
    assert len({case["clause"] for case in runs}) >= len(able) - 4
    assert len({case["awkward"] for case in runs}) == len(runs)
    assert (vectors.FOLDER / "run.json").stat().st_size < 1.75 * 2**20


def test_a_run_has_the_form_of_a_step_case() -> None:
    """One reader serves both files; the schemas are two because a schema that points to another needs a registry."""
    step, run = (
        json.loads((vectors.FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))["$defs"]
        for kind in ("step", "run")
    )
    del run["case"]["properties"]["awkward"]
    run["case"]["required"].remove("awkward")
    assert run == step


@pytest.mark.parametrize("kind", ["step", "run"])
def test_gxpo_py_follows_the_vectors(kind: str) -> None:
    for case in vectors.load(kind):
        harness = Harness(torch_adapter.Port(), everything(), "float64", "cpu")
        assert replay(harness, case) <= 1, case["id"]


@pytest.mark.parametrize("port", [port for port in correct() if port.about], ids=lambda port: port.name)
def test_what_the_rules_leave_open_passes_the_vectors(port: RightPort) -> None:
    """A file that rejects a right port makes its author break it."""
    played = 0
    for case in (case for kind in ("step", "run") for case in vectors.load(kind)):
        if case["clause"].startswith(port.about) and not missing(case, {**everything(), **port.declares}):
            assert replay(Harness(port, everything(), "float64", "cpu"), case) <= 1, case["id"]
            played += 1
    assert played


def test_no_q_is_asked_for_where_two_are_right() -> None:
    """At r = -1 and an even K q = 1 is as right as K/2 (EXT-05)."""
    with_a_pole = [case for case in vectors.load("scale") if -1.0 in case["r"]]
    assert with_a_pole
    assert all(case["horizon"] % 2 for case in with_a_pole)


def test_gxpo_py_follows_the_scale_vectors() -> None:
    for case in vectors.load("scale"):
        r, q, tolerance = (torch.tensor(case[key], dtype=torch.float64) for key in ("r", "q", "tolerance"))
        assert ((gxpo.extrapolation_scale(r, case["horizon"]) - q).abs() <= tolerance).all(), case["id"]


def test_gxpo_py_follows_the_ratio_vectors() -> None:
    for case in vectors.load("ratio"):
        g0, g1 = (case[c] * torch.tensor(case[g], dtype=torch.float64) for g, c in (("g0", "c0"), ("g1", "c1")))
        r = gxpo.retention_ratio(g0, g1, g0.square().mean().sqrt().item())
        off = (gxpo.extrapolation_scale(r, case["horizon"]) - torch.tensor(case["q"], dtype=torch.float64)).abs()
        assert (off <= torch.tensor(case["tolerance"], dtype=torch.float64)).all(), case["id"]


def test_the_gate_vectors_tell_a_gate_all_it_needs() -> None:
    """By the plainest gate there is, written here: a window, one-sided, no option."""
    ran = 0
    for case in vectors.load("gate"):
        gate = case["gate"]
        if gate["baseline"] != "window" or {"patience", "two_sided", "warmup", "cooldown"} & set(case["flags"]):
            continue
        if gate["max_active_steps"] is not None or gate["statistic"] == "never":
            continue
        past: list[float] = []
        tripped = False
        for step in case["steps"]:
            assert step["active"] == (not tripped)
            if tripped or step["h"] is None:
                continue
            recent, z = past[-gate["window"] :], None
            if len(recent) == gate["window"]:
                z = (step["h"] - np.mean(recent)) / (np.std(recent) + 1e-9)
                assert abs(z - step["z"]) <= case["z_tolerance"] * max(1.0, abs(z)), case["id"]
            assert (step["z"] is None) == (z is None)
            tripped = z is not None and z >= gate["threshold"]
            assert step["trips"] == tripped
            past.append(step["h"])
        ran += 1
    assert ran >= 8


def test_a_changed_number_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = vectors.load("step")[3]
    end = copy.deepcopy(case["steps"])
    name = next(iter(end[0]["end"]))
    end[0]["end"][name]["data"][0] += 1e-9
    change(folder, "step", 3, steps=end)
    assert vectors.check() == 1
    assert f"{case['id']}.steps[0].end.{name}.data[0] is " in capsys.readouterr().out


def test_a_case_with_another_input_gets_another_id(folder: Path) -> None:
    """Somebody's list of passed ids must go on meaning what it meant."""
    before, gone = [case["id"] for case in vectors.load("scale")], vectors.read("scale")["retired"]
    change(folder, "scale", 0, r=[0.125], q=[1.0], tolerance=[1e-15])  # as if the file were of an older suite
    made, retired = vectors.numbered(make())["scale"]
    assert retired == sorted([*gone, before[0]])
    assert before[0] not in {case["id"] for case in made}
    assert [case["id"] for case in made][1:] == before[1:]
    (folder / "scale.json").write_text(json.dumps({"cases": made, "retired": retired}), encoding="utf-8")
    assert vectors.numbered(make())["scale"] == (made, retired)  # and so it stays


def test_an_id_that_another_file_has_had_is_not_given_again(folder: Path) -> None:
    """step.json and gate.json share the clauses' numbers, and a case may move from one to the other."""
    case = vectors.load("gate")[0]
    change(folder, "step", 0, id=f"{case['clause']}/41")
    change(folder, "gate", 0, gate={**case["gate"], "omega": 0.3})
    made = vectors.numbered(make())["gate"][0]
    assert made[0]["id"] == f"{case['clause']}/42"


def test_a_wrong_port_fails_a_vector() -> None:
    case = next(case for case in vectors.load("step") if case["clause"] == "MOV-02")
    with pytest.raises(Failure, match="theta~"):
        replay(Harness(MUTANTS["alpha-on-excess"].port(), everything(), "float64", "cpu"), case)


def test_each_run_rejects_the_mistake_that_it_names() -> None:
    """A case that its nearest mistake passes proves nothing, whatever margin is written beside it."""
    for case in vectors.load("run")[::8]:
        with pytest.raises(Failure):
            replay(Harness(MUTANTS[case["nearest"]].port(), everything(), "float64", "cpu"), case)


def test_a_run_is_played_by_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    case = vectors.load("run")[0]
    assert cli.main(["repro", case["id"], "--impl", "gxpo_conformance.adapters.oracle:Port"]) == 0
    assert case["comment"] in capsys.readouterr().out
