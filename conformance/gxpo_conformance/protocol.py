"""What a port's author sees: the adapter, the configuration, the capabilities.

A port is a black box that asks for gradients. The points it asks at, and where it ends, are all that is judged.
`gxpo_conformance.adapters.torch` is the adapter of gxpo.py and the example to start from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]  # tensor name -> values: float64 in a float64 run, float32 otherwise
Gradient = Callable[[Arrays], tuple[float, Arrays]]  # parameters -> the loss there and its gradient; may raise
Config = dict[str, Any]

DTYPES = ("float64", "float32", "bfloat16")


class Session(Protocol):
    """One training run."""

    def step(self, grad: Gradient) -> None:
        """One outer step. Each call of `grad` is one backward pass, and is counted. What `grad` raises comes out."""
        ...

    def params(self) -> Arrays:
        """The parameters now."""
        ...

    def save(self) -> object:
        """Everything needed to go on later. Only with the capability "checkpoint"."""
        ...

    def load(self, saved: Any) -> None:
        """Go on from `saved`, in a fresh session with the same config. Only with the capability "checkpoint"."""
        ...


class Port(Protocol):
    """What --impl names as module:attribute; called without arguments."""

    name: str

    def capabilities(self) -> dict[str, Any]:
        """What the port declares; see CAPABILITIES. What is not declared is not tested, and the report says so."""
        ...

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        """A run from `params`. ValueError for a config that makes no sense or that the port does not take."""
        ...


CAPABILITIES: dict[str, tuple[str, ...] | type[bool]] = {
    "dtypes": DTYPES,
    "devices": ("cpu", "cuda"),
    "optimizers": ("sgd", "adamw"),
    "estimators": ("gradient", "displacement", "tensor"),
    "optimizer_state": ("keep", "restore"),
    "gate_statistics": ("corrective_norm", "initial_norm", "disagreement", "never"),
    "gate_baselines": ("window", "ema"),
    "gate_options": ("patience", "two_sided", "warmup", "cooldown", "max_active_steps"),
    "max_grad_norm": bool,
    "checkpoint": bool,
    "nonfinite": bool,
    "exceptions": bool,
}
# Without these there is nothing to certify: the core of the method.
CORE = {
    "optimizers": "sgd",
    "estimators": "gradient",
    "gate_statistics": "corrective_norm",
    "gate_baselines": "window",
}


def everything() -> dict[str, Any]:
    """The declaration of a port that has it all."""
    return {key: list(choices) if isinstance(choices, tuple) else True for key, choices in CAPABILITIES.items()}


class AdapterError(Exception):
    """The adapter broke before a verdict: exit status 2."""


class PortError(Exception):
    """The port's process died, hung or sent what it should not: a finding, with the port's last words."""

    def __init__(self, text: str, timed_out: bool = False) -> None:
        super().__init__(text)
        self.timed_out = timed_out


def check_capabilities(declared: object) -> dict[str, Any]:
    """The declaration, checked. Raises AdapterError that names the key, the choices and what was declared."""
    if not isinstance(declared, dict):
        raise AdapterError(f"capabilities() must return a dict, got {type(declared).__name__}")
    for key in declared:
        if key not in CAPABILITIES:
            raise AdapterError(f"capabilities() has an unknown key {key!r}; known: {', '.join(CAPABILITIES)}")
    checked: dict[str, Any] = {}
    for key, choices in CAPABILITIES.items():
        if isinstance(choices, tuple):
            values = declared.get(key, [])
            wrong = [v for v in values if v not in choices] if isinstance(values, list | tuple) else [values]
            if wrong:
                raise AdapterError(f"capabilities()[{key!r}] must be a list out of {list(choices)}, got {values!r}")
            checked[key] = list(values)
        else:
            if not isinstance(declared.get(key, False), bool):
                raise AdapterError(f"capabilities()[{key!r}] must be true or false, got {declared[key]!r}")
            checked[key] = declared.get(key, False)
    for key, needed in CORE.items():
        if needed not in checked[key]:
            raise AdapterError(f"capabilities()[{key!r}] must hold {needed!r}, the core; got {checked[key]!r}")
    for key in ("dtypes", "devices", "optimizer_state"):
        if not checked[key]:
            raise AdapterError(f"capabilities()[{key!r}] must name at least one of {everything()[key]}")
    if not {"float64", "float32"} & set(checked["dtypes"]):
        raise AdapterError("capabilities()['dtypes'] must hold float64 or float32: bfloat16 alone certifies nothing")
    return checked


def declares(capabilities: dict[str, Any], need: str) -> bool:
    """Whether "key" or "key:value" is declared."""
    key, _, value = need.partition(":")
    return value in capabilities[key] if value else capabilities[key]


def config(**changes: Any) -> Config:
    """A whole configuration: the defaults below with `changes`; gate and optimizer are merged key by key.

    The default gate's window never fills, so that cases about something else lean on no gate and no option.
    """
    made: Config = {
        "horizon": 5,
        "alpha": 1.0,
        "estimator": "gradient",
        "optimizer_state": "keep",
        "max_grad_norm": None,
        "gate": {
            "statistic": "corrective_norm",
            "baseline": "window",
            "window": 1000,
            "omega": 0.1,
            "threshold": 3.0,
            "patience": 1,
            "two_sided": False,
            "warmup": 0,
            "cooldown": None,
            "max_active_steps": None,
        },
        "optimizer": {"name": "sgd", "lr": 0.125, "momentum": 0.0, "weight_decay": 0.0},
    }
    optimizer = changes.pop("optimizer", {})
    if optimizer.get("name") == "adamw":
        made["optimizer"] = {"name": "adamw", "lr": 0.125, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    for name, part in (("gate", changes.pop("gate", {})), ("optimizer", optimizer), (None, changes)):
        target = made if name is None else made[name]
        unknown = part.keys() - target.keys()
        if unknown:
            raise KeyError(f"no such key in a config: {sorted(unknown)}")
        target.update(part)
    return made
