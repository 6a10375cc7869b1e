"""Runs one part in a process of its own, and says how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gxpo
from gxpo_reference.benchmarks.cuda_day import outcomes
from gxpo_reference.benchmarks.cuda_day.parts import Part, checkout
from gxpo_reference.benchmarks.measure import Progress

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
GRACE = 30.0  # seconds to write down what there is, once asked to stop


@dataclass
class Record:
    """What is kept of a part that has ended, as JSON."""

    part: str
    kind: str
    about: str
    command: str
    outcome: str = PASSED
    why: str = ""  # it failed or was left out
    seconds: float = 0.0
    conditions: dict[str, Any] = field(default_factory=dict)  # under which it counts as done
    figures: dict[str, Any] = field(default_factory=dict)
    log_ends: list[str] = field(default_factory=list)  # lines, where it failed

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def conditions(device: str, quick: bool, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parts that were run under others say nothing about these."""
    made = {"device": device, "quick": quick, "gxpo": hashlib.sha256(Path(gxpo.__file__).read_bytes()).hexdigest()[:12]}
    return made | {key: (facts or {}).get(name) for key, name in (("torch", "torch"), ("on", "device"))}


def surroundings(device: str) -> dict[str, str]:
    """One GPU, the first that may be used: trainers would otherwise spread over all that they see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else ""
    told = {"CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**os.environ, **told}


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def end(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started. Asked first: pytest then writes its report."""
    for name, patience in (("SIGINT", GRACE), ("SIGKILL", None)):
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, name))
            else:  # Windows
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def wait(process: subprocess.Popen[bytes], limit: float, log: Path, progress: Progress) -> bool:
    """Whether it ended in time; else it is ended."""
    began = time.monotonic()
    try:
        while time.monotonic() - began < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25)
                return True
            progress.say(last_line(log)[:60] or "starting")
        return False
    finally:
        progress.end()
        if process.poll() is None:
            end(process)


def run(part: Part, folder: Path, device: str, limit: float | None = None) -> Record:
    """`limit`: seconds, in place of the part's own."""
    command = [sys.executable, *part.command]
    record = Record(part.name, part.kind, part.about, shlex.join(["python", *part.command]))
    log, root, began = folder / f"{part.name}.log", checkout() or folder, time.monotonic()
    part.writes.unlink(missing_ok=True)  # or what an earlier run wrote would be taken for this one's
    limit = 60 * part.minutes if limit is None else limit
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=surroundings(device),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        in_time = wait(process, limit, log, Progress(part.name))
    record.seconds = time.monotonic() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome = outcomes.read(part.kind, part.writes, text, process.returncode)
    record.figures, record.why, record.outcome = outcome.figures, outcome.why, FAILED if outcome.why else PASSED
    if outcome.does_not_fit:
        record.outcome = LEFT_OUT
    if not in_time:
        record.outcome, record.why = FAILED, f"not done within {limit / 60:.3g} min" + f", {outcome.why}".rstrip(", ")
    if record.outcome == FAILED:
        record.log_ends = text.splitlines()[-15:]
    return record
