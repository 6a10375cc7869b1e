"""Arrays as JSON: what travels over standard input and output, and what the vectors are written in.

An array is {"shape": [...], "data": [...]}, row by row. Numbers are shortest round-trip decimals of the value as a
double; a float32 value is sent as the double it equals. Non-finite ones are the strings "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from gxpo_conformance.protocol import Arrays

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def number(value: float) -> float | str:
    """One number as JSON has it."""
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def parse_number(value: Any) -> float:
    """The number that `number` wrote. ValueError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    raise ValueError(f'a number must be a JSON number or "NaN", "Infinity", "-Infinity", got {shortened(value)}')


def to_wire(arrays: Arrays) -> dict[str, Any]:
    """Named arrays as JSON has them."""
    sent = {}
    for name, a in arrays.items():
        data = np.asarray(a, dtype=np.float64).ravel()
        numbers = data.tolist()  # thousands of them: one by one only where it has to be
        sent[name] = {
            "shape": list(a.shape),
            "data": numbers if np.isfinite(data).all() else list(map(number, numbers)),
        }
    return sent


def from_wire(sent: Any, kind: type = np.float64) -> Arrays:
    """Named arrays of numpy type `kind`. ValueError that says what is not as it should be."""
    if not isinstance(sent, dict):
        raise ValueError(f"named arrays must be a JSON object, got {shortened(sent)}")
    arrays: Arrays = {}
    for name, a in sent.items():
        if not isinstance(a, dict) or a.keys() != {"shape", "data"}:
            raise ValueError(f'{name!r} must be {{"shape": [...], "data": [...]}}, got {shortened(a)}')
        shape, data = a["shape"], a["data"]
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise ValueError(f"{name!r} must have a shape of ints >= 0, got {shortened(shape)}")
        if not isinstance(data, list) or len(data) != math.prod(shape):
            got = len(data) if isinstance(data, list) else shortened(data)
            raise ValueError(f"{name!r} of shape {shape} must have {math.prod(shape)} numbers of data, got {got}")
        plain = set(map(type, data)) <= {int, float}
        with np.errstate(over="ignore"):
            arrays[name] = np.array(data if plain else list(map(parse_number, data)), dtype=kind).reshape(shape)
    return arrays


def dumps(message: dict[str, Any]) -> str:
    """One line of JSON, without the line's end."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
