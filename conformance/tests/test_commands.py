"""The command gxpo-conformance as its users meet it: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from gxpo_conformance import cli
from gxpo_conformance.clauses.table import clauses

ORACLE = "gxpo_conformance.adapters.oracle:Port"
TIMES = re.compile(r"in [\d.]+ s")


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A port in the folder one stands in that applies alpha to q - 1."""
    module = """\
        from gxpo_conformance.adapters import oracle as oracle_adapter
        from gxpo_conformance.mutants import MUTANTS

        Port = MUTANTS["alpha-on-excess"].port
        """
    (tmp_path / "wrong_port.py").write_text(textwrap.dedent(module), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "wrong_port:Port"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------ reports


def test_a_failure_tells_all_that_its_author_needs(wrong: str, tmp_path: Path, capsys: Any) -> None:
    """Clause, first divergence, nearest mistake, the command that reruns it, and a case that stands alone."""
    assert cli.main(["--impl", wrong, "--only", "MOV-02", "--dtype", "float64", "--json", "out.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "matches a known mistake: applies alpha to q - 1" in printed
    assert "gxpo-conformance repro MOV-02 --impl wrong_port:Port --dtype float64" in printed
    head, *results, foot = lines(tmp_path / "out.jsonl")
    found = next(r for r in results if r["clause"] == "MOV-02")
    assert found["finding"].keys() >= {"step", "phase", "tensor", "coordinate", "got", "wanted", "budgets"}
    assert found["finding"]["phase"] == "theta~"
    assert found["nearest"]["id"] == "alpha-on-excess"
    assert head["record"] == "header"
    assert set(head["vectors_sha256"]) >= {"scale.json", "ratio.json", "step.json", "gate.json"}
    assert foot["results"] == len(results) == sum(foot["counts"].values())

    # the case alone, put to this port and to a right one
    (tmp_path / "case.json").write_text(json.dumps(found["case"]), encoding="utf-8")
    assert cli.main(["repro", "case.json", "--impl", wrong]) == 1
    assert "theta~" in capsys.readouterr().out
    assert cli.main(["repro", "case.json", "--impl", ORACLE]) == 0


def test_the_command_that_reruns_it_does(wrong: str, tmp_path: Path, capsys: Any) -> None:
    cli.main(["--impl", wrong, "--only", "MOV-02", "--dtype", "float64"])
    rerun = re.search(r"gxpo-conformance (repro .*)", capsys.readouterr().out)
    assert cli.main([*rerun[1].split(), "--case", "case.json"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"theta~ +w = \[.*right: ", shown)
    assert "matches a known mistake" in shown
    assert json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))["clause"] == "MOV-02"


def test_every_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    reports = ["--json", "a.jsonl", "--junit", "b.xml", "--html", "c.html", "--badge", "d.json"]
    assert cli.main(["--impl", ORACLE, "--only", "EXT", *reports]) == 3
    assert all((tmp_path / name).stat().st_size > 0 for name in reports[1::2])


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["--impl", ORACLE, "--only", "EXT-01", "--json", str(tmp_path / "no" / "where.json")]) == 2
    assert "cannot write the report" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ known failures

KNOWN = """\
[[known]]
clause = "{clause}"
dtypes = ["float64"]
reason = "alpha is applied late"
link = "https://example.org/7"
"""


def test_a_known_failure_does_not_fail_the_run_and_is_not_hidden(wrong: str, tmp_path: Path, capsys: Any) -> None:
    """CI has to stay useful with one known fault, and nobody may read that as conformant."""
    (tmp_path / "known.toml").write_text(KNOWN.format(clause="MOV-02"), encoding="utf-8")
    arguments = ["--impl", wrong, "--only", "MOV-02", "--dtype", "float64", "--known", "known.toml"]
    assert cli.main(arguments) == 3  # of one clause alone nothing is complete
    printed = capsys.readouterr().out
    assert "known-fail" in printed
    assert "alpha is applied late https://example.org/7" in printed
    assert "1 known to fail" in printed
    assert "FAIL " not in printed


def test_a_known_failure_that_passes_is_an_error(tmp_path: Path, capsys: Any) -> None:
    """Or the list would outlive the faults, and hide them when they come back."""
    (tmp_path / "known.toml").write_text(KNOWN.format(clause="EXT-01"), encoding="utf-8")
    arguments = ["--impl", ORACLE, "--only", "EXT-01", "--known", str(tmp_path / "known.toml")]
    assert cli.main(arguments) == 1
    assert "take it off the list" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("known = 3", "entries must be [[known]] tables"),
        ("[[known]]\nclause = 'EXT-01'", "reason must be a text that is not empty, got None"),
        (KNOWN.format(clause="EXT-99"), "no such clause: EXT-99"),
        (KNOWN.format(clause="EXT-01") * 2, "EXT-01 is listed twice"),
        (KNOWN.format(clause="EXT-01") + "until = 'May'", "unknown key 'until'"),
        (KNOWN.format(clause="EXT-01").replace("float64", "float16"), "dtypes must be a list out of"),
        ("[[known", "--known"),
    ],
)
def test_a_broken_list_of_known_failures_is_told(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "known.toml").write_text(text, encoding="utf-8")
    assert cli.main(["--impl", ORACLE, "--only", "EXT-01", "--known", str(tmp_path / "known.toml")]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- list, smoke, repro


def test_list_has_every_clause_and_says_what_shows_it(capsys: Any) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(c in printed for c in clauses())
    assert "alpha scales the whole move, seen at theta~" in printed
    assert cli.main(["list", "ext,mov-01"]) == 0
    assert set(re.findall(r"^([A-Z]{3})-", capsys.readouterr().out, re.M)) == {"EXT", "MOV"}


def test_smoke_passes_a_right_port(capsys: Any) -> None:
    assert cli.main(["smoke", "--impl", ORACLE]) == 0
    assert "adapter and method answer" in capsys.readouterr().out


def test_smoke_tells_a_wrong_method_from_a_broken_adapter(wrong: str, tmp_path: Path, capsys: Any) -> None:
    """An author with a broken adapter must not go looking for the fault in the maths."""
    assert cli.main(["smoke", "--impl", wrong]) == 1
    assert "the METHOD is wrong: MOV-01" in capsys.readouterr().out

    broken = (
        "from gxpo_conformance.adapters import oracle as oracle_adapter\n\n\nclass Session(oracle_adapter.Session):\n"
    )
    broken += "    def params(self):\n        return [1.0]\n\n\nclass Port(oracle_adapter.Port):\n"
    broken += "    def start(self, params, config, dtype, device):\n"
    broken += "        return Session(super().start(params, config, dtype, device).oracle)\n"
    (tmp_path / "broken_port.py").write_text(broken, encoding="utf-8")
    assert cli.main(["smoke", "--impl", "broken_port:Port"]) == 2
    assert "the ADAPTER is broken (start, one step, params): params() gives tensors list" in capsys.readouterr().err


def test_repro_shows_points_beside_the_right_ones(capsys: Any) -> None:
    assert cli.main(["repro", "GAT-02", "--impl", ORACLE]) == 0
    assert "GAT-02  The window holds the preceding observations" in capsys.readouterr().out
    assert cli.main(["repro", "MOV-02/1", "--impl", ORACLE]) == 0
    assert "of a tolerance used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("EXT-99", "no clause, vector or file 'EXT-99'"),
        ("GAT-02/1", "is of the kind gate: run its clause, repro GAT-02"),
        ("pyproject.toml", "pyproject.toml: "),
    ],
)
def test_repro_of_what_is_not_there_is_told(target: str, message: str, capsys: Any) -> None:
    assert cli.main(["repro", target, "--impl", ORACLE]) == 2
    assert message in capsys.readouterr().err


def test_search_is_a_command(wrong: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["search", "--impl", ORACLE, "--seeds", "1", "--cases", "5"]) == 0
    arguments = ["search", "--impl", wrong, "--dtype", "float64", "--seeds", "1", "--case", "case.json"]
    assert cli.main(arguments) == 1
    assert "theta" in capsys.readouterr().out
    assert cli.main(["repro", "case.json", "--impl", wrong]) == 1


# ------------------------------------------------------------------------------------------------- bad command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "XYZ"], "no clause or group 'XYZ'"),
        (["--time-limit", "0"], "must be a number of seconds > 0, got 0"),
        (["--impl", "a:B", "--exec", "c"], "not allowed with argument"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["search", "--seeds", "0"], "must be an int >= 1, got 0"),
    ],
)
def test_a_bad_option_is_told_in_a_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_helps(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*([command] if command else []), "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: gxpo-conformance {command}".rstrip())
    assert command or all(name in printed for name in cli.COMMANDS)


# --------------------------------------------------------------------------------------------- in a port's own pytest

TESTS = """\
from gxpo_conformance.testing import parametrize_with_clauses


@parametrize_with_clauses("{port}", dtypes=["float64"], known={known!r})
def test_gxpo(clause):
    clause.check()
"""


def pytest_in(folder: Path, port: str, known: str | None = None, only: str = "EXT or MOV") -> str:
    (folder / "test_mine.py").write_text(TESTS.format(port=port, known=known), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", only, "test_mine.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300).stdout


def test_the_pytest_entry_has_a_test_a_clause(wrong: str, tmp_path: Path) -> None:
    """A port's CI should show which clause broke, by its number."""
    printed = pytest_in(tmp_path, ORACLE)
    assert "PASSED test_mine.py::test_gxpo[EXT-03-float64]" in printed
    assert "10 passed" in printed
    printed = pytest_in(tmp_path, wrong)
    assert "FAILED test_mine.py::test_gxpo[MOV-02-float64]" in printed
    assert "MOV-02: alpha multiplies q" in printed
    assert "Traceback" not in printed


def test_the_pytest_entry_takes_known_failures(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(KNOWN.format(clause="MOV-02"), encoding="utf-8")
    assert "1 xfailed" in pytest_in(tmp_path, wrong, "known.toml", "MOV-02")
    assert "XPASS(strict)" in pytest_in(tmp_path, ORACLE, "known.toml", "MOV-02")


# -------------------------------------------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("arguments", "status", "last"),
    [
        (["--dtype", "float64"], 0, "verdict: conformant"),
        (["--only", "EXT,GAT-03", "--dtype", "float32"], 3, "verdict: incomplete"),
        (["--dtype", "bfloat16"], 3, "verdict: incomplete"),
    ],
)
def test_the_command_and_its_exit_status(arguments: list[str], status: int, last: str, capsys: Any) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr().out
    assert last in printed
    assert printed.rstrip().endswith("end of report")  # a cut-off report cannot look whole
    assert "EXT-03  MUST" in printed
    assert max(map(len, printed.splitlines())) <= 132


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "no_such_module:Port"], "--impl no_such_module:Port: ModuleNotFoundError"),
        (["--impl", "gxpo"], "--impl must be module:attribute"),
        (["--impl", "gxpo:nothing"], "AttributeError"),
    ],
)
def test_a_broken_adapter_is_exit_status_2(arguments: list[str], message: str, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert cli.main(["--device", "cuda"]) == 2
    assert "does not declare cuda among its devices" in capsys.readouterr().err


def test_the_suite_needs_no_torch_for_other_ports() -> None:
    """People who port to JAX or plain numpy must not have to install torch to be judged."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from gxpo_conformance.cli import main\n"
        "sys.exit(main(['--impl', 'gxpo_conformance.adapters.oracle:Port', '--only', 'EXT']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "EXT-05  MUST" in done.stdout


def test_two_runs_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        cli.main(["--dtype", "float32", "--only", "EST,TOY"])
        printed.append(TIMES.sub("", capsys.readouterr().out))
    assert printed[0] == printed[1]
