"""The command gxpo-conformance as its users meet it: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fewer_runs import few_runs
from ports_on_disk import ORACLE, WRONG, put
from test_known import KNOWN

from gxpo_conformance import cli
from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.testing import parametrize_with_clauses

TIMES = re.compile(r"in [\d.]+ s")


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A port in the folder one stands in that applies alpha to q - 1."""
    return put("wrong_port", WRONG, tmp_path, monkeypatch)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------------------- reports


def test_a_failure_tells_all_that_its_author_needs(wrong: str, tmp_path: Path, capsys: Any) -> None:
    """Clause, first divergence, nearest mistake, the command that reruns it, and a case that stands alone."""
    assert cli.main(["--impl", wrong, "--only", "MOV-02", "--dtype", "float64", "--json", "out.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "applies alpha to q - 1 in place of q (alpha-on-excess)" in printed
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
    assert "(alpha-on-excess)" in shown
    assert json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))["clause"] == "MOV-02"


def test_every_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    reports = ["--json", "a.jsonl", "--junit", "b.xml", "--html", "c.html", "--badge", "d.json"]
    assert cli.main(["--impl", ORACLE, "--only", "EXT", *reports]) == 3
    assert all((tmp_path / name).stat().st_size > 0 for name in reports[1::2])


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        (["--json", "no/where.json"], "--json: cannot write no/where.json: the folder"),
        (["--html", "folder"], "--html: cannot write folder: it is a folder"),
        (["--json", "one", "--junit", "./one"], "--junit ./one: --json names the same file"),
        (["--badge", "known.toml"], "--badge known.toml: --known names the same file"),
        (["--json", " "], "--json: the file's name is empty"),
    ],
)
def test_a_report_that_cannot_be_written_is_told_before_the_run(
    reports: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Twenty minutes on a GPU would end with nothing to read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "known.toml").write_text(KNOWN.format(clause="MOV-02"), encoding="utf-8")
    assert cli.main(["--impl", ORACLE, "--only", "EXT-01", "--known", "known.toml", *reports]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "EXT-01" not in told.out
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "known.toml"}
    assert "alpha is applied late" in (tmp_path / "known.toml").read_text(encoding="utf-8")


def test_an_old_report_stays_until_there_is_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A port that cannot be loaded today would take yesterday's report with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("yesterday", encoding="utf-8")
    assert cli.main(["--impl", "no_such_module:Port", "--json", "a.jsonl", "--html", "b.html"]) == 2
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "yesterday"
    assert not (tmp_path / "b.html").exists()
    assert cli.main(["--impl", ORACLE, "--only", "EXT-01", "--json", "a.jsonl", "--badge", "/dev/null"]) == 3
    assert len(lines(tmp_path / "a.jsonl")) > 2


@pytest.mark.parametrize("arguments", [["search", "--case"], ["repro", "MOV-01", "--case"], ["selftest", "--json"]])
def test_the_other_commands_try_their_files_first(arguments: list[str], capsys: Any) -> None:
    assert cli.main([*arguments, "no/where.json"]) == 2
    assert "cannot write no/where.json" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- list


def test_list_has_every_clause_and_says_what_shows_it(capsys: Any) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(c in printed for c in clauses())
    assert "alpha scales the whole move, seen at theta~" in printed
    assert cli.main(["list", "ext,mov-01"]) == 0
    assert set(re.findall(r"^([A-Z]{3})-", capsys.readouterr().out, re.M)) == {"EXT", "MOV"}


# ---------------------------------------------------------------------------------------------------- bad command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "XYZ"], "no clause or group 'XYZ'"),
        (["--only", "EXT,GAT-33"], "no clause or group 'GAT-33'; did you mean 'GAT-03'?"),
        (["--only", ""], "argument --only: the value is empty"),
        (["--impl", ""], "argument --impl: the value is empty, so that no port is named"),
        (["--exec", "  "], "argument --exec: the value is empty, so that no port is named"),
        (["smoke", "--impl", ""], "argument --impl: the value is empty"),
        (["repro", ""], "argument TARGET: the value is empty"),
        (["--known", ""], "argument --known: the value is empty"),
        (["vectors", "--write", ""], "argument --write: the value is empty"),
        (["--ony", "EXT"], "no option '--ony'; did you mean '--only'?"),
        (["--impl", ORACLE, "smoke"], "'smoke' is a command and has to come first: gxpo-conformance smoke ..."),
        (["--impl", ORACLE, "more"], "'more' belongs to no option"),
        (["selftest", "alpha-on-exces"], "no mutant 'alpha-on-exces'; did you mean 'alpha-on-excess'?"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok", "--impl", ORACLE], "no command 'smok'; did you mean 'smoke'? (the commands: list, smoke, repro"),
        (["tset"], "no command 'tset' (the commands: list"),
        (["vectors", "--write", "no/where"], "--write no/where: does not exist; name a folder that does"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(arguments: list[str], message: str, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unset_variable_does_not_make_a_ci_green(monkeypatch: pytest.MonkeyPatch) -> None:
    """`impl=os.environ.get("PORT", "")` would have the bundled gxpo.py judged in place of the port, and pass."""
    for empty in ({"impl": ""}, {"command": " "}, {"known": ""}):
        with pytest.raises(AdapterError, match=r"empty|--known"):
            parametrize_with_clauses(**empty)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_helps(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*([command] if command else []), "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: gxpo-conformance {command}".rstrip())
    assert command or all(name in printed for name in cli.COMMANDS)
    assert f"example:\n  gxpo-conformance {command}".rstrip() in printed
    assert command in ("list", "vectors") or "Exit status: 0" in printed


# ----------------------------------------------------------------------------------------------- in a port's own pytest

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
        (["--dtype", "float64"], 0, "verdict: conformant (core)\n"),
        (["--only", "EXT,GAT-03", "--dtype", "float32"], 3, "verdict: incomplete"),
        (["--dtype", "bfloat16"], 3, "verdict: incomplete"),
    ],
)
def test_the_command_and_its_exit_status(arguments: list[str], status: int, last: str, capsys: Any) -> None:
    with few_runs():
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
