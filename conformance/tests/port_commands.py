"""Ports in processes of their own, given as commands: made, and judged."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path

from gxpo_conformance.process.load import load
from gxpo_conformance.trial import Verdict, judge

# Greets, takes sessions, asks for two gradients a step, and misbehaves where a test puts something of its own.
FAKE = """\
import json, os, sys, time, signal
def say(message):
    print(message if isinstance(message, str) else json.dumps(message), flush=True)
def words(text):
    print(text, file=sys.stderr, flush=True)
CAPABILITIES = {"dtypes": ["float64"], "devices": ["cpu"], "optimizers": ["sgd"], "estimators": ["gradient"],
    "optimizer_state": ["keep"], "gate_statistics": ["corrective_norm"], "gate_baselines": ["window"]}
params = {}
def on_hello(m): say({"name": "fake", "capabilities": CAPABILITIES})
def on_start(m): params[m["session"]] = m["params"]; say({"ok": True})
def on_step(m):
    for _ in range(2):
        say({"ask": params[m["session"]]}); sys.stdin.readline()
    say({"done": True})
def on_params(m): say({"params": params[m["session"]]})
def on_close(m): say({"ok": True})
@@
while True:
    m = json.loads(sys.stdin.readline() or '{"op": "bye"}')
    if m["op"] == "bye": break
    globals()["on_" + m["op"]](m)
"""


def fake_port(folder: Path, code: str = "") -> str:
    """The command of a fake port with `code` in it."""
    path = folder / "fake.py"
    path.write_text(FAKE.replace("@@", textwrap.dedent(code)), encoding="utf-8")
    return f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(path))}"


def served(adapter: str) -> str:
    """The command of an in-process adapter behind the protocol."""
    return f"{shlex.quote(sys.executable)} -m gxpo_conformance.process.serve {adapter}"


def judged(command: str, time_limit: float = 5.0, only: str = "OPT-01") -> Verdict:
    port = load(None, command, time_limit)
    try:
        return judge(port, only=only.split(","))
    finally:
        port.close()
