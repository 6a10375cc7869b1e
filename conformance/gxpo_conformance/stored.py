"""A case from a file or a vector: read, checked, and what a port must declare to play it."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.harness.case import Case
from gxpo_conformance.protocol import CAPABILITIES, DTYPES, AdapterError, config, declares
from gxpo_conformance.suggest import did_you_mean
from gxpo_conformance.vectors import files as vectors
from gxpo_conformance.wire import from_wire, parse_number

BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)  # what a malformed case leads to


def read(target: str) -> Case:
    """The case that a file or a vector's id stands for, its configuration complete."""
    if not Path(target).exists():
        return vector(target)
    try:
        case = json.loads(Path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{target}: {error}") from error
    if not isinstance(case, dict) or not {"config", "params", "steps"} <= case.keys():
        raise AdapterError(f"{target} is not a case: it must have config, params and steps (vectors/step.schema.json)")
    return checked(case, target)


def vector(target: str) -> Case:
    there = [case for kind in ("step", "gate", "run") for case in vectors.load(kind)]
    found = next((case for case in there if case["id"].upper() == target.upper()), None)
    if found is None:
        names = [case["id"] for case in there] if "/" in target else list(clauses())
        near = did_you_mean(target, names)
        raise AdapterError(f"no clause, vector or file {target!r}{near} (gxpo-conformance list shows the clauses)")
    if "config" not in found:
        raise AdapterError(f"{target} is of the kind gate: run its clause, repro {found['clause']}")
    return checked(found, target)


def checked(case: Case, target: str) -> Case:
    """AdapterError where it cannot be played, whatever the port."""
    try:
        made = {**case, "config": config(**deepcopy(case["config"])), "dtype": case.get("dtype", "float64")}
        from_wire(made["params"])
        if made["dtype"] not in DTYPES:
            raise ValueError(f"no dtype {made['dtype']!r}")
        for step in made["steps"]:
            for answer in step["answers"]:
                if "raise" not in answer:
                    from_wire(answer["grads"])
                    parse_number(answer["loss"])
            for points in (*step.get("asked", []), *step.get("tolerance", []), step["end"], step["end_tolerance"]):
                from_wire(points)
            if step["outcome"] != "raised" and not {"asked", "tolerance"} <= step.keys():
                raise ValueError("a step without asked and tolerance")
    except BROKEN as error:
        raise AdapterError(malformed(target, error)) from error
    return made


def malformed(target: str, error: Exception) -> str:
    return f"{target} is not a case that can be played: {error!r} (vectors/step.schema.json has its form)"


def needs(case: Case) -> list[str]:
    """The capabilities, "key" or "key:value", that a port must declare to be put this case."""
    made, gate, default = case["config"], case["config"]["gate"], config()["gate"]
    answers = [answer for step in case["steps"] for answer in step["answers"]]
    found = {
        f"dtypes:{case['dtype']}": True,
        f"optimizers:{made['optimizer']['name']}": True,
        f"estimators:{made['estimator']}": True,
        f"optimizer_state:{made['optimizer_state']}": True,
        "max_grad_norm": made["max_grad_norm"] is not None,
        f"gate_statistics:{gate['statistic']}": True,
        f"gate_baselines:{gate['baseline']}": True,
        **{f"gate_options:{name}": gate[name] != default[name] for name in CAPABILITIES["gate_options"]},  # pyright: ignore[reportGeneralTypeIssues]  # a tuple there
        "checkpoint": any(step.get("resume") for step in case["steps"]),
        "exceptions": any("raise" in answer for answer in answers),
        "nonfinite_losses": any(bad(a["loss"]) for a in answers if "raise" not in a),
        "nonfinite_gradients": any(bad(g) for a in answers if "raise" not in a for g in numbers(a["grads"])),
    }
    return [need for need, needed in found.items() if needed]


def missing(case: Case, capabilities: dict[str, Any]) -> list[str]:
    return [need for need in needs(case) if not declares(capabilities, need)]


def bad(value: Any) -> bool:
    return not math.isfinite(parse_number(value))


def numbers(grads: dict[str, Any]) -> list[Any]:
    return [value for tensor in grads.values() for value in tensor["data"]]
