"""Plays one clause, vector or failing case again, and shows every point asked for beside the right one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.case import Case, as_case, replay
from gxpo_conformance.harness.findings import PHASES, Failure
from gxpo_conformance.harness.harness import Dialogue, Recorder
from gxpo_conformance.mutants.nearest import Nearest, how
from gxpo_conformance.protocol import AdapterError, Arrays, Port, config
from gxpo_conformance.trial import FAIL, PASS, Trial
from gxpo_conformance.vectors import files as vectors
from gxpo_conformance.wire import from_wire

MOST_STEPS = 12  # of a run shown in full; of a longer one, those about the first that differs
SHOWN = 8  # coordinates of a tensor


def reproduce(
    target: str, port: Port, dtypes: Sequence[str] | None, device: str, case_file: str | None, time_limit: float
) -> int:
    """Exit status 0 where it passes, 1 where it fails, 3 where the port does not declare what it needs."""
    trial = Trial(port, dtypes, device, time_limit=time_limit)
    if target.upper() in clauses():
        return clause(target.upper(), trial, case_file)
    given = read(target)
    dtype = given.get("dtype", "float64")
    if dtype not in trial.harnesses:
        raise AdapterError(f"{target} is a case in {dtype}; this run has {', '.join(trial.harnesses)}")
    harness = trial.harnesses[dtype]
    print(f"{target}: {given.get('comment', 'a case')}, {dtype}, {trial.verdict.port}")
    try:
        used = replay(harness, given)
    except Failure as failure:
        if harness.latest:
            show(harness.latest)
        print(f"FAIL  {failure}")
        return 1
    print(f"pass, at most {used:.2g} of a tolerance used")
    return 0


def read(target: str) -> Case:
    """The case that a file or a vector's id stands for."""
    if "/" in target and not Path(target).exists():
        found = [c for kind in ("step", "gate") for c in vectors.load(kind) if c["id"] == target.upper()]
        if found and "config" in found[0]:
            return found[0]
        if found:
            raise AdapterError(f"{target} is of the kind gate: run its clause, repro {found[0]['clause']}")
    try:
        case = json.loads(Path(target).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"no clause, vector or file {target!r}; gxpo-conformance list shows the clauses") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{target}: {error}") from error
    if not isinstance(case, dict) or not {"config", "params", "steps"} <= case.keys():
        raise AdapterError(f"{target} is not a case: it must have config, params and steps (vectors/step.schema.json)")
    return case


def clause(number: str, trial: Trial, case_file: str | None) -> int:
    print(f"{number}  {clauses()[number].rule}")
    results = trial.settle(number)
    ran = [r for r in results.values() if r.verdict in (PASS, FAIL)]
    for result in results.values():
        print(f"\n{trial.verdict.port}, {result.dtype}: {result.verdict}  {result.message}")
        if result.verdict == FAIL:
            if result.talk:
                show(result.talk)
            found = Nearest(trial.verdict).of(result)
            if found and result.finding:
                print(f"{how(result.finding)}: {found.does} ({found.id})")
            case = result.case()
            if case_file and case:
                Path(case_file).write_text(json.dumps({"clause": number, **case}, indent=1) + "\n", encoding="utf-8")
                print(f"the run is in {case_file}: gxpo-conformance repro {case_file} plays it again")
                case_file = None  # the first dtype that fails
    if any(r.verdict == FAIL for r in ran):
        return 1
    if not results:
        print(f"none of these dtypes can show it, only {', '.join(CHECKS[number].dtypes)}")
    return 0 if ran else 3


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
