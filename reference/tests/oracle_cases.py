"""Settings, gradients and comparisons of the oracle's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import settings

from gxpo_reference.oracle import Arrays

drawn = settings(max_examples=60, deadline=None, database=None)
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
ADAMW = {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
GATE = {
    "statistic": "supplied",
    "baseline": "window",
    "window": 4,
    "threshold": 3.0,
    "patience": 1,
    "two_sided": False,
    "warmup": 0,
    "cooldown": None,
    "max_active_steps": None,
}
EMA = {"baseline": "ema", "omega": 0.5}


def config(**changes: Any) -> dict:
    base = {
        "horizon": 5,
        "alpha": 0.5,
        "estimator": "gradient",
        "optimizer_state": "restore",
        "max_grad_norm": None,
        "gate": None,
        "optimizer": SGD,
    }
    assert changes.keys() <= base.keys()
    return copy.deepcopy(base | changes)


def arrays(**values: Any) -> Arrays:
    return {name: np.array(value, dtype=np.float64) for name, value in values.items()}


def scripted(*grads: Arrays, losses: Sequence[float] = ()) -> Callable[[Arrays], tuple[float, Arrays]]:
    """Pass i returns grads[i], whatever point was asked."""
    turns = iter([(losses[i] if losses else 0.0, g) for i, g in enumerate(grads)])
    return lambda point: next(turns)


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality through dicts, lists, arrays and dataclasses."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and a.tobytes() == b.tobytes()
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b


def close(got: Any, want: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
