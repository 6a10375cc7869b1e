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
from gxpo_conformance.adapters import torch as torch_adapter
from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.case import replay
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.protocol import everything
from gxpo_conformance.vectors import files as vectors


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


@pytest.mark.parametrize("kind", vectors.KINDS)
def test_the_files_follow_their_schemas(kind: str) -> None:
    schema = json.loads((vectors.FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(vectors.read(kind))


@pytest.mark.parametrize("kind", vectors.KINDS)
def test_a_schema_refuses_what_proves_nothing(kind: str) -> None:
    """A schema that takes everything checks nothing."""
    schema = json.loads((vectors.FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    for wrong in ({"margin": 9.5}, {"nearest": None}, {"clause": "EXT"}, {"colour": "red"}):
        file = copy.deepcopy(vectors.read(kind))
        file["cases"][0].update(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(file, schema)


def test_every_case_has_a_clause_an_id_of_its_own_and_a_known_mistake_far_away() -> None:
    cases = [case for kind in vectors.KINDS for case in vectors.load(kind)]
    assert len({case["id"] for case in cases}) == len(cases) > 150
    assert all(case["clause"] in clauses() and case["nearest"] in MUTANTS for case in cases)
    assert not any(vectors.unfit(case["margin"]) for case in cases)


def test_every_clause_that_one_run_can_show_is_in_the_files() -> None:
    """Whoever can use the files alone should miss no more than has to be missed."""
    found = {case["clause"] for kind in vectors.KINDS for case in vectors.load(kind)}
    left_out = {c for c in clauses() if c.startswith("TOY") or c in vectors.ABOUT_SEVERAL_RUNS}
    left_out |= {c for c in clauses() if "float64" not in CHECKS[c].dtypes} | {"EXT-06", "DEV-02"}  # no step is made
    assert set(clauses()) - found == left_out


def test_gxpo_py_follows_the_step_vectors() -> None:
    for case in vectors.load("step"):
        harness = Harness(torch_adapter.Port(), everything(), "float64", "cpu")
        assert replay(harness, case) <= 1, case["id"]


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
    before = [case["id"] for case in vectors.load("scale")]
    change(folder, "scale", 0, r=[0.125], q=[1.0], tolerance=[1e-15])  # as if the file were of an older suite
    cases = vectors.make()["scale"]
    made, retired = vectors.numbered("scale", cases, vectors.read("scale"))
    assert retired == [before[0]]
    assert before[0] not in {case["id"] for case in made}
    assert [case["id"] for case in made][1:] == before[1:]
    file = {"cases": made, "retired": retired}
    assert vectors.numbered("scale", cases, file) == (made, retired)  # and so it stays


def test_a_wrong_port_fails_a_vector() -> None:
    case = next(case for case in vectors.load("step") if case["clause"] == "MOV-02")
    with pytest.raises(Failure, match="theta~"):
        replay(Harness(MUTANTS["alpha-on-excess"].port(), everything(), "float64", "cpu"), case)
