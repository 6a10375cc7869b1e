"""gxpo-conformance repro: what was found is played again, and what cannot be is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ports_on_disk import ORACLE, WRONG, oracle_with, put

from gxpo_conformance import cli
from gxpo_conformance.vectors import files as vectors


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A port in the folder one stands in that applies alpha to q - 1."""
    return put("wrong_port", WRONG, tmp_path, monkeypatch)


def test_repro_shows_points_beside_the_right_ones(capsys: Any) -> None:
    assert cli.main(["repro", "GAT-02", "--impl", ORACLE]) == 0
    assert "GAT-02  The window holds the preceding observations" in capsys.readouterr().out
    assert cli.main(["repro", "MOV-02/1", "--impl", ORACLE]) == 0
    assert "of a tolerance used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("EXT-50", "no clause, vector or file 'EXT-50'; did you mean 'EXT-05'?"),
        ("EXT-01/99", "no clause, vector or file 'EXT-01/99'; did you mean 'EXT-01/"),
        ("NUM-03#999", "NUM-03 has no awkward run NUM-03#999"),
        ("RND-03#0/1", "no awkward run 'RND-03#0/1'"),
        ("GAT-02/1", "is of the kind gate: run its clause, repro GAT-02"),
        ("pyproject.toml", "pyproject.toml: "),
    ],
)
def test_repro_of_what_is_not_there_is_told(target: str, message: str, capsys: Any) -> None:
    assert cli.main(["repro", target, "--impl", ORACLE]) == 2
    assert message in capsys.readouterr().err


def test_repro_plays_an_awkward_run_by_its_name(wrong: str, tmp_path: Path, capsys: Any) -> None:
    """A report names it; without that its author has a sentence, and nothing to step through."""
    for name in ("NUM-03#1", "rnd-02#0/3"):
        assert cli.main(["repro", name, "--impl", ORACLE]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{name.upper()}, float64, numpy oracle: ")
        assert "rounding budgets used" in printed
    statuses = {n: cli.main(["repro", f"RND-02#0/{n}", "--impl", wrong, "--dtype", "float64"]) for n in range(6)}
    assert 1 in statuses.values()
    failing = next(n for n, status in statuses.items() if status == 1)
    capsys.readouterr()
    arguments = ["repro", f"RND-02#0/{failing}", "--impl", wrong, "--dtype", "float64", "--case", "case.json"]
    assert cli.main(arguments) == 1
    assert "right: " in capsys.readouterr().out
    assert json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))["clause"] == "RND-02"
    assert cli.main(["repro", "case.json", "--impl", wrong]) == 1
    assert cli.main(["repro", "case.json", "--impl", ORACLE]) == 0


# A step case -> the capability that a port must declare for it, found among the vectors by a word of its flags.
NEEDS = {"adamw": "optimizers", "tensor": "estimators", "clipping": "max_grad_norm", "ema": "gate_baselines"}
NEEDS |= {"resumed": "checkpoint", "exception": "exceptions", "restore": "optimizer_state"}


@pytest.mark.parametrize("flag", NEEDS)
def test_a_case_of_what_is_not_declared_is_not_played(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It would be a traceback, or a failure of what the port never said it does."""
    core = "def capabilities(self):\n    return {'dtypes': ['float64'], 'devices': ['cpu'], 'optimizers': ['sgd'], "
    core += "'estimators': ['gradient'], 'optimizer_state': ['keep'], 'gate_statistics': ['corrective_norm'], "
    core += "'gate_baselines': ['window']}\n"
    port = put("core_port", oracle_with(port=core), tmp_path, monkeypatch)
    case = next(c for c in vectors.load("step") if flag in c["flags"])
    (tmp_path / "case.json").write_text(json.dumps(case), encoding="utf-8")
    for target in ("case.json", case["id"]):
        assert cli.main(["repro", target, "--impl", port]) == 3
        assert re.search(f"not played: the port does not declare .*{NEEDS[flag]}", capsys.readouterr().out)


def test_a_case_that_the_port_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    refuses = "def start(self, *args, **more):\n    raise ValueError('no such horizon')\n"
    port = put("refusing_port", oracle_with(port=refuses), tmp_path, monkeypatch)
    assert cli.main(["repro", "MOV-02/1", "--impl", port]) == 2
    assert "refuses the configuration of MOV-02/1, though it declares all of it: no such horizon" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"horizen": 5}}, "horizen"),
        ({"params": {"w": [1.0]}}, "must be"),
        ({"steps": [{"outcome": "active"}]}, "answers"),
        ({"dtype": "float16"}, "no dtype 'float16'"),
        ({"dtype": "float32"}, "not played: the port does not declare dtypes:float32"),
    ],
)
def test_a_broken_case_is_told(change: dict[str, Any], message: str, tmp_path: Path, capsys: Any) -> None:
    """Cases are edited by hand, to make them smaller."""
    case = {**next(c for c in vectors.load("step") if c["id"] == "MOV-02/1"), **change}
    (tmp_path / "case.json").write_text(json.dumps(case), encoding="utf-8")
    status = cli.main(["repro", str(tmp_path / "case.json"), "--impl", ORACLE])
    told = capsys.readouterr()
    assert status == (3 if "not played" in message else 2)
    assert message in told.out + told.err
    assert "Traceback" not in told.err


def test_the_case_is_not_written_over_itself(wrong: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["repro", "MOV-01", "--impl", wrong, "--dtype", "float64", "--case", "case.json"]) == 1
    assert cli.main(["repro", "case.json", "--impl", wrong, "--case", "case.json"]) == 2
    assert "TARGET names the same file" in capsys.readouterr().err


def test_search_is_a_command(wrong: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["search", "--impl", ORACLE, "--seeds", "1", "--cases", "5"]) == 0
    arguments = ["search", "--impl", wrong, "--dtype", "float64", "--seeds", "1", "--case", "case.json"]
    assert cli.main(arguments) == 1
    assert "theta" in capsys.readouterr().out
    assert cli.main(["repro", "case.json", "--impl", wrong]) == 1
