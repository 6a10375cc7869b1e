"""Slips of an adapter's author: each is told in a sentence, and none is a traceback or loses the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ports_on_disk import oracle_with, put

from gxpo_conformance import cli

MODULES = {  # a module -> what is said of it, exit status 2
    "class Port:\n    def __init__(self, model): ...\n": "the adapter is called without arguments",
    "import sys\n\nsys.exit(0)\n": "it ended the program when it was loaded",
    "raise KeyboardInterrupt\n": "KeyboardInterrupt",
    "Port = 3\n": "this is a int, and cannot be called",
    "def Port():\n    return 3\n": "gives a int, which has no capabilities(), start(), name: it is not an adapter",
    "class Port:\n    name = 'mine'\n": "which has no capabilities(), start(): it is not an adapter",
    "class port: ...\n": "has no 'Port'; did you mean 'port'?",
    "import no_such_module\n": "No module named 'no_such_module'",
}
BROKEN = {  # methods of the port -> what is said of it, exit status 2
    "def capabilities(self):\n    raise SystemExit(3)": "the adapter broke before the first step: SystemExit(3)",
    "def capabilities(self):\n    return None": "capabilities() must return a dict",
    "@property\ndef name(self):\n    raise RuntimeError('no name')": "RuntimeError('no name')",
}


@pytest.mark.parametrize("command", [["--only", "EXT-01"], ["smoke"], ["repro", "EXT-01"]], ids=lambda c: c[0])
@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_gives_no_port_is_told(
    command: list[str], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    port = put("slip_port", module, tmp_path, monkeypatch)
    assert cli.main([*command, "--impl", port]) == 2
    told = capsys.readouterr().err
    assert MODULES[module] in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("port", BROKEN)
def test_a_port_that_cannot_be_asked_is_told(
    port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    named = put("slip_port", oracle_with(port=port), tmp_path, monkeypatch)
    assert cli.main(["--impl", named]) == 2
    assert BROKEN[port] in capsys.readouterr().err


def test_what_a_module_prints_is_no_part_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`list` and the verdict are read by other programs."""
    port = put("slip_port", "print('training begins')\n" + oracle_with(), tmp_path, monkeypatch)
    assert cli.main(["--impl", port, "--only", "EXT-01"]) == 3
    told = capsys.readouterr()
    assert "training begins" not in told.out
    assert "training begins" in told.err


FINDINGS = {  # methods of session and port -> (clause that fails, what is said)
    ("", "def start(self, *args, **more):\n    oracle.Port.start(self, *args, **more)"): (
        "OPT-01",
        "start() gives None, which has no step() and no params(); it must return a session",
    ),
    ("save = property()", ""): ("CKP-01", "the port's save() raised AttributeError"),
    ("load = None", ""): ("CKP-01", "the port's load() raised TypeError"),
    ("def step(self, grad):\n    sys.exit(4)", ""): ("OPT-01", "the port's step raised SystemExit(4)"),
    ("def step(self, grad):\n    raise KeyboardInterrupt", ""): (
        "OPT-01",
        "the port's step raised KeyboardInterrupt()",
    ),
    ("def step(self, grad):\n    raise BaseException('mine')", ""): (
        "OPT-01",
        "the port's step raised BaseException('mine')",
    ),
}


@pytest.mark.parametrize("slip", FINDINGS)
def test_a_slip_in_a_session_is_a_finding(
    slip: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A traceback in the middle of a run loses what the other clauses found."""
    clause, message = FINDINGS[slip]
    port = put("slip_port", oracle_with(*slip), tmp_path, monkeypatch)
    assert cli.main(["--impl", port, "--only", f"{clause},EXT-01"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"FAIL {clause}" in printed
    assert message in printed
    assert "end of report" in printed
    assert cli.main(["repro", clause, "--impl", port]) == 1
