"""gxpo-conformance smoke: whose fault it is, said within seconds."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ports_on_disk import ORACLE, WRONG, oracle_with, put

from gxpo_conformance import cli


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A port in the folder one stands in that applies alpha to q - 1."""
    return put("wrong_port", WRONG, tmp_path, monkeypatch)


def test_smoke_passes_a_right_port(capsys: Any) -> None:
    assert cli.main(["smoke", "--impl", ORACLE]) == 0
    assert "adapter and method answer" in capsys.readouterr().out


def test_smoke_tells_a_wrong_method_from_a_broken_adapter(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An author with a broken adapter must not go looking for the fault in the maths."""
    assert cli.main(["smoke", "--impl", wrong]) == 1
    assert "the METHOD is wrong: MOV-01" in capsys.readouterr().out

    listed = put("broken_port", oracle_with("def params(self):\n    return [1.0]"), tmp_path, monkeypatch)
    assert cli.main(["smoke", "--impl", listed]) == 2
    assert "the ADAPTER is broken (start, one step, params): params() gives tensors list" in capsys.readouterr().err


HANGS = {  # a session's methods -> what smoke says
    "def step(self, grad):\n    time.sleep(60)": "this step had asked for no gradient: look at the adapter's step()",
    "def step(self, grad):\n    grad(self.params())\n    time.sleep(60)": "this step had asked for 1 gradient: look at",
}


@pytest.mark.parametrize("session", HANGS)
def test_a_port_that_hangs_is_said_within_one_time_limit(
    session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Seven clauses of half a minute each looked like a stuck command, and then like a wrong method."""
    port = put("hanging_port", oracle_with(session), tmp_path, monkeypatch)
    began = time.perf_counter()
    assert cli.main(["smoke", "--impl", port, "--time-limit", "0.5"]) == 2
    assert time.perf_counter() - began < 3
    told = capsys.readouterr()
    assert "the port HANGS (start, one step, params): the port's step did not return within 0.5 s" in told.err
    assert HANGS[session] in told.err
    assert "METHOD" not in told.out + told.err


def test_the_time_limit_of_smoke_is_for_somebody_who_waits(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["smoke", "--help"])
    assert "(default: 10)" in capsys.readouterr().out


REFUSES = """\
def start(self, params, config, **more):
    if config["gate"]["window"] < 10:
        raise KeyError("window")
    return super().start(params, config, **more)
"""


def test_a_port_that_dies_is_not_a_wrong_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A KeyError is the adapter's slip; its author would go through the formulas of the gate."""
    port = put("dying_port", oracle_with(port=REFUSES), tmp_path, monkeypatch)
    assert cli.main(["smoke", "--impl", port]) == 2
    told = capsys.readouterr()
    assert "DIED  GAT-01" in told.out
    assert "the port's start() raised KeyError('window')" in told.out
    assert "the port DIES, raises or sends what it should not in CST-01, GAT-01" in told.err
    assert "METHOD is wrong" not in told.out + told.err


CLOSES_BADLY = """
import sys
from gxpo_conformance.adapters import oracle
from gxpo_conformance.process import serve


class Server(serve.Server):
    def on_close(self, message):
        sys.exit(7)


Server(oracle.Port(), sys.stdin, sys.stdout).run()
"""


def test_a_close_that_fails_is_the_adapters_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    put("closes_badly", CLOSES_BADLY, tmp_path, monkeypatch)
    assert cli.main(["smoke", "--exec", f"{shlex.quote(sys.executable)} closes_badly.py"]) == 2
    told = capsys.readouterr()
    assert "the ADAPTER is broken (another session after it)" in told.err
    assert '"close"' in told.err
    assert "method" not in told.out


def test_smoke_asks_in_every_dtype_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The second was dropped: who asked for both took float32 for right, and it was not looked at."""
    both = "from gxpo_conformance.mutants import correct\n\n\ndef Port():\n    return correct()[0]\n"
    port = put("both_port", both, tmp_path, monkeypatch)
    assert cli.main(["smoke", "--impl", port, "--dtype", "float64", "--dtype", "float32"]) == 0
    assert re.findall(r"on cpu, (\w+);", capsys.readouterr().out) == ["float64", "float32"]
    assert cli.main(["smoke", "--impl", port]) == 0
    assert re.findall(r"on cpu, (\w+);", capsys.readouterr().out) == ["float64"]
