"""A run point by point: what a port asked at, beside what a right one asks."""

from __future__ import annotations

from typing import Any

import numpy as np

from gxpo_conformance.harness.case import as_case
from gxpo_conformance.harness.findings import PHASES
from gxpo_conformance.harness.harness import Dialogue
from gxpo_conformance.harness.recorder import Recorder
from gxpo_conformance.protocol import Arrays, config
from gxpo_conformance.wire import from_wire

MOST_STEPS = 12  # of a run shown in full; of a longer one, those about the first that differs
SHOWN = 8  # coordinates of a tensor


def show(talk: Dialogue) -> None:
    """Configuration, and each step: what was asked, and what a right port would have."""
    case = as_case(talk)
    print(f"config: {changes(talk.config, config())} (elsewhere the suite's defaults)")
    steps = list(zip(talk.steps, case["steps"], strict=True))
    for n, (recorder, right) in list(enumerate(steps))[-MOST_STEPS:]:
        gate = right.get("gate", {})
        scored = "" if gate.get("h") is None else f", the gate sees {gate['h']:.6g}"
        scored += "" if gate.get("z") is None else f", z = {gate['z']:.4g}"
        print(f"step {n}: {right['outcome']}{scored}{', and trips' if gate.get('trips') else ''}")
        step(recorder, right)


def step(recorder: Recorder, right: dict[str, Any]) -> None:
    wanted = [from_wire(point) for point in right.get("asked", [])]
    for i, phase in enumerate(PHASES):
        got, want = recorder.asked[i : i + 1], wanted[i : i + 1]
        if got and want:
            print("\n".join(f"    {phase:<7} {line}" for line in compared(got[0], want[0])))
        elif got:
            print(f"    {phase:<7} asked, and should not have been")
        elif want and recorder.raise_at is None:
            print(f"    {phase:<7} not asked, and should have been")


def compared(got: Arrays, want: Arrays) -> list[str]:
    lines = []
    for name, right in want.items():
        off = np.abs(got[name].astype(np.float64) - right)
        lines.append(f"{name} = {numbers(got[name])}")
        if off.max(initial=0.0) > 0:
            lines[-1] += f"  right: {numbers(right)}  differs by at most {off.max():.3g}"
    return lines


def numbers(a: np.ndarray) -> str:
    flat = [f"{v:.9g}" for v in a.ravel()[:SHOWN]]
    return f"[{', '.join(flat)}{', ...' if a.size > SHOWN else ''}]"


def changes(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration is not the default."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            inner = changes(value, default[key] if value.get("name") == default[key].get("name") else {})
            found |= {key: inner} if inner else {}
        elif value != default.get(key):
            found[key] = value
    return found
