"""Lists of known failures: a CI stays useful with one known fault, and a list may not outlive what it lists."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ports_on_disk import ORACLE, WRONG, oracle_with, put

from gxpo_conformance import cli
from gxpo_conformance.known import Known
from gxpo_conformance.process.load import load
from gxpo_conformance.trial import judge


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A port in the folder one stands in that applies alpha to q - 1."""
    return put("wrong_port", WRONG, tmp_path, monkeypatch)


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


def test_a_known_failure_that_passes_is_said_in_its_own_words(tmp_path: Path, capsys: Any) -> None:
    """Or the list would outlive the faults, and hide them when they come back; yet the port has failed nothing."""
    (tmp_path / "known.toml").write_text(KNOWN.format(clause="EXT-01"), encoding="utf-8")
    arguments = ["--impl", ORACLE, "--only", "EXT-01", "--known", str(tmp_path / "known.toml")]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "EXT-01 passes, though --known lists it as failing: take it off the list" in printed
    assert "not conformant" not in printed


def test_a_known_failure_that_passes_in_one_dtype_is_narrowed(wrong: str, tmp_path: Path) -> None:
    """ "Take it off the list" would turn the other dtype's failure into a new one."""
    every_dtype = {"MOV-02": Known("MOV-02", "alpha is applied late", "https://example.org/7")}
    verdict = judge(load(wrong), ["float64", "float32"], only=["MOV-02"], known=every_dtype)
    passes = dataclasses.replace(verdict.results["MOV-02"]["float32"], verdict="error")
    verdict.results["MOV-02"]["float32"] = passes
    assert verdict.exit_status == 1
    assert (
        'MOV-02 passes in float32, though --known lists it as failing there: let its entry say dtypes = ["float64"]'
        in verdict.words
    )


@pytest.mark.parametrize(
    ("clause", "only", "message"),
    [
        ("EXT-02", "EXT-01", "--known lists EXT-02, which was not run (not run)"),
        ("GAT-10", "EXT-01,GAT-10", "--known lists GAT-10, which this port does not declare (it needs gate_options"),
    ],
)
def test_an_entry_without_use_is_said(
    clause: str, only: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A list for another port, or a clause that is not declared any more, looks as if it did something."""
    few = "def capabilities(self):\n    return {**super().capabilities(), 'gate_options': []}\n"
    port = put("few_port", oracle_with(port=few), tmp_path, monkeypatch)
    (tmp_path / "known.toml").write_text(KNOWN.format(clause=clause), encoding="utf-8")
    assert cli.main(["--impl", port, "--only", only, "--known", "known.toml"]) == 3
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("known = 3", "entries must be [[known]] tables"),
        ("[[known]]\nclause = 'EXT-01'", "reason must be a text that is not empty, got None"),
        (KNOWN.format(clause="EXT-99"), "no clause 'EXT-99'; did you mean"),
        (KNOWN.format(clause="EXT-10"), "no clause 'EXT-10'; did you mean 'EXT-01'?"),
        (KNOWN.format(clause="EXT-01").replace("[[known]]", "[[knwon]]"), "unknown key 'knwon'; did you mean 'known'?"),
        (KNOWN.format(clause="EXT-01").replace("reason", "raeson"), "unknown key 'raeson'; did you mean 'reason'?"),
        (KNOWN.format(clause="EXT-01").replace('["float64"]', "[[1]]"), "dtypes must be a list out of"),
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
