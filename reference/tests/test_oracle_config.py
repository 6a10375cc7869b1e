"""If these fail, the oracle takes settings that are none, and judges ports by another method than the one named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from oracle_cases import ADAMW, EMA, GATE, SGD, arrays, config

from gxpo_reference.oracle import Oracle


def nested(path: str, value: Any) -> dict:
    settings_ = config(gate=GATE | {"omega": 0.1}, optimizer=ADAMW)
    if path in ("optimizer.momentum", "optimizer.name"):
        settings_["optimizer"] = dict(SGD)
    *outer, key = path.split(".")
    (settings_[outer[0]] if outer else settings_)[key] = value
    return settings_


BAD = {
    "horizon": ("an int >= 2", [1, True, 2.0, None]),
    "alpha": ("a finite number >= 0", [-0.1, math.inf, math.nan, "1", True]),
    "estimator": ("one of gradient, displacement, tensor", ["Gradient", None]),
    "optimizer_state": ("one of restore, keep", ["reset"]),
    "max_grad_norm": ("a finite number > 0 or None", [0, -1.0, math.inf]),
    "gate": ("a dict or None", ["never"]),
    "optimizer": ("a dict", [None]),
    "gate.statistic": ("one of corrective_norm, initial_norm, disagreement, supplied, never", ["norm"]),
    "gate.baseline": ("one of window, ema", ["mean"]),
    "gate.window": ("an int >= 2", [1, 30.0]),
    "gate.omega": ("a number in", [0, 1.1, math.nan]),
    "gate.threshold": ("a finite number > 0", [0, math.inf, None]),
    "gate.patience": ("an int >= 1", [0, True]),
    "gate.two_sided": ("true or false", [1, None]),
    "gate.warmup": ("an int >= 0", [-1, None]),
    "gate.cooldown": ("an int >= 0 or None", [-1, 1.5]),
    "gate.max_active_steps": ("an int >= 0 or None", [-1, False]),
    "optimizer.name": ("one of sgd, adamw", ["adam", None]),
    "optimizer.lr": ("a finite number >= 0", [-1, math.nan]),
    "optimizer.momentum": ("a finite number >= 0", [-0.1]),
    "optimizer.betas": ("two numbers in", [[0.9, 1.0], [-0.1, 0.9], [0.9], 0.9]),
    "optimizer.eps": ("a finite number >= 0", [-1e-8]),
    "optimizer.weight_decay": ("a finite number >= 0", [-1]),
}


@pytest.mark.parametrize(
    ("path", "bound", "value"), [(path, bound, v) for path, (bound, values) in BAD.items() for v in values]
)
def test_bad_setting_is_refused_by_name_bound_and_value(path: str, bound: str, value: Any) -> None:
    """A silent acceptance would run another method under the name of this one."""
    with pytest.raises(ValueError, match="must be") as error:
        Oracle(arrays(w=1.0), nested(path, value))
    assert str(error.value).startswith(f"{path} must be {bound}")
    assert str(error.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("path", ["horizons", "gate.windows", "optimizer.beta", "optimizer.dampening"])
def test_unknown_key_is_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key {path}"):
        Oracle(arrays(w=1.0), nested(path, 1))


@pytest.mark.parametrize("path", ["alpha", "gate.patience", "gate.window", "optimizer.betas"])
def test_missing_key_is_refused_by_name(path: str) -> None:
    settings_ = nested(path, 1)
    *outer, key = path.split(".")
    del (settings_[outer[0]] if outer else settings_)[key]
    with pytest.raises(ValueError, match=f"missing key {path}"):
        Oracle(arrays(w=1.0), settings_)


@pytest.mark.parametrize(
    "settings_",
    [
        nested("alpha", 1.5),
        nested("alpha", np.float64(0)),
        nested("horizon", np.int64(2)),
        nested("max_grad_norm", 1),
        nested("gate.max_active_steps", 0),
        nested("gate.cooldown", 0),
        nested("gate.omega", 1),
        nested("optimizer.lr", 0),
        nested("optimizer.betas", (0, 0.5)),
        config(gate={key: value for key, value in GATE.items() if key != "window"} | EMA),
    ],
)
def test_settings_at_their_bounds_are_taken(settings_: dict) -> None:
    assert Oracle(arrays(w=1.0), settings_).step(lambda p: (0.0, p), supplied=1.0).passes in (1, 3)
