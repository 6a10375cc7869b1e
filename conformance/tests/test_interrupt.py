"""Ctrl-C: a verdict on what ran, the reports that were asked for, and no traceback."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from ports_on_disk import ORACLE, oracle_with, put

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
# Each says that it is in the middle of the run: of a step that comes after some clauses have been settled.
SLOW = """\
def step(self, grad):
    Session.steps = getattr(Session, "steps", 0) + 1
    if Session.steps == 30:
        open("begun", "w").close()
    if Session.steps >= 30:
        time.sleep(0.5)
    self.oracle.step(grad)
"""
CAUGHT = """\
        try:
            time.sleep(0.5)
        except BaseException:
            {}
"""
SWALLOWS, WRAPS = (
    SLOW.replace("        time.sleep(0.5)\n", CAUGHT.format(what)) for what in ("pass", "raise ValueError('stopped')")
)
DEAF = """\
def step(self, grad):
    open("begun", "w").close()
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
"""


def living(group: int) -> list[str]:
    """Processes of a group that have not ended; one that nobody has waited for has."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in listed.splitlines()]
    return [pid for pgid, state, pid in found if pgid == str(group) and not state.startswith("Z")]


def interrupted(folder: Path, *arguments: str, times: int = 1) -> tuple[int, str, str]:
    """Run the command until the file `begun` is there, interrupt it; (exit status, standard output, standard error)."""
    command = [sys.executable, "-m", "gxpo_conformance.cli", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (folder / "begun").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("session", [SLOW, SWALLOWS, WRAPS], ids=["slow", "swallows", "wraps"])
def test_what_ran_is_judged_and_reported(session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour's run would be lost; or the port's own `except` would take Ctrl-C for a failed loss, and go on."""
    port = put("slow_port", oracle_with(session), tmp_path, monkeypatch)
    status, out, err = interrupted(tmp_path, "--impl", port, "--junit", "a.xml", "--html", "b.html")
    assert status == 130
    assert err == ""
    verdict = next(line for line in out.splitlines() if line.startswith("verdict: "))
    assert verdict.startswith("verdict: interrupted after ")
    assert verdict.endswith("clauses; none of those that ran failed")
    assert out.rstrip().endswith("end of report")
    cases = ET.parse(tmp_path / "a.xml").getroot().iter("testcase")
    assert any(len(case) == 0 for case in cases)  # some passed
    assert "interrupted" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_the_process_of_a_port_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a session of its own, where the terminal's Ctrl-C does not come: it would train on for ever."""
    saying = SLOW.replace('open("begun", "w").close()', 'print(os.getpid(), file=open("begun", "w"), flush=True)')
    port = put("slow_port", oracle_with(saying), tmp_path, monkeypatch)
    served = f"{shlex.quote(sys.executable)} -m gxpo_conformance.process.serve {port}"
    status, out, err = interrupted(tmp_path, "--exec", served)
    assert (status, err) == (130, "")
    assert "verdict: interrupted after " in out
    end = time.monotonic() + 5
    while alive := living(int((tmp_path / "begun").read_text(encoding="utf-8"))):  # it leads a group
        assert time.monotonic() < end, alive
        time.sleep(0.05)


@pytest.mark.parametrize("command", [["smoke"], ["repro", "TOY-01"]], ids=lambda c: c[0])
def test_the_other_commands_say_so_in_a_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = SLOW.replace("== 30", "== 2").replace(">= 30", ">= 2")
    port = put("slow_port", oracle_with(soon), tmp_path, monkeypatch)
    status, _, err = interrupted(tmp_path, *command, "--impl", port)
    assert (status, err) == (130, "gxpo-conformance: interrupted\n")


def test_the_second_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody whose port catches everything would have to look for its number."""
    port = put("deaf_port", oracle_with(DEAF), tmp_path, monkeypatch)
    began = time.monotonic()
    status, _, _ = interrupted(tmp_path, "--impl", port, times=2)
    assert status == 130
    assert time.monotonic() - began < 30  # the time limit of one request


def test_selftest_ends_with_its_workers(tmp_path: Path) -> None:
    """Each of them would print a traceback of its own, or go on in the background."""
    command = [sys.executable, "-m", "gxpo_conformance.cli", "selftest"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "gxpo-conformance: interrupted\n")
    end = time.monotonic() + 5
    while alive := living(process.pid):
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def test_a_ports_own_interrupt_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = put("own_port", oracle_with("def step(self, grad):\n    raise KeyboardInterrupt"), tmp_path, monkeypatch)
    command = [sys.executable, "-m", "gxpo_conformance.cli", "--impl", port, "--only", "OPT-01"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the port's step raised KeyboardInterrupt()" in done.stdout
    assert ORACLE not in done.stdout
