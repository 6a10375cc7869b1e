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

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        """One outer step. Each call of `grad` is one backward pass, and is counted. What `grad` raises comes out.

        `statistic`: what the caller measured at theta0 (the policy's entropy, say), for a gate whose statistic is
        "supplied". It is passed in every step of such a session, single passes too, and in no other session: a port
        that does not declare "supplied" may do without the argument.
        """
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
    "gate_statistics": ("corrective_norm", "initial_norm", "disagreement", "supplied", "never"),
    "gate_baselines": ("window", "ema"),
    "gate_options": ("patience", "two_sided", "warmup", "cooldown", "max_active_steps"),
    "max_grad_norm": bool,
    "checkpoint": bool,
    "nonfinite_gradients": bool,
    "nonfinite_losses": bool,
    "exceptions": bool,
}
# What a declaration may still say, and what that means; the names above win over it.
FORMER = {"nonfinite": ("nonfinite_gradients", "nonfinite_losses")}
# Without one of these for each key there is nothing to certify: the core of the method.
CORE: dict[str, tuple[str, ...]] = {
    "optimizers": ("sgd",),
    "estimators": ("gradient",),
    "gate_statistics": ("corrective_norm",),
    "gate_baselines": ("window", "ema"),
}
# How many choices of a list the core has: one more is an option. Dtypes and devices are where it runs, no options.
CORE_CHOICES = {**dict.fromkeys(CORE, 1), "optimizer_state": 1, "gate_options": 0}


NEVER_FULL = 1000  # observations in the default gate's window


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
    """The declaration, checked, with every key of CAPABILITIES and no other. Raises AdapterError that names the key,
    the choices and what was declared."""
    if not isinstance(declared, dict):
        raise AdapterError(f"capabilities() must return a dict, got {type(declared).__name__}")
    for key in declared:
        if key not in CAPABILITIES and key not in FORMER:
            raise AdapterError(f"capabilities() has an unknown key {key!r}; known: {', '.join(CAPABILITIES)}")
    given = {new: declared[old] for old, means in FORMER.items() if old in declared for new in means} | declared
    checked: dict[str, Any] = {}
    for key, choices in CAPABILITIES.items():
        if isinstance(choices, tuple):
            values = given.get(key, [])
            wrong = [v for v in values if v not in choices] if isinstance(values, list | tuple) else [values]
            if wrong:
                raise AdapterError(f"capabilities()[{key!r}] must be a list out of {list(choices)}, got {values!r}")
            checked[key] = list(dict.fromkeys(values))
        else:
            if not isinstance(given.get(key, False), bool):
                said = key if key in declared else next(old for old, means in FORMER.items() if key in means)
                raise AdapterError(f"capabilities()[{said!r}] must be true or false, got {given[key]!r}")
            checked[key] = given.get(key, False)
    for key, enough in CORE.items():
        if not set(enough) & set(checked[key]):
            needed = " or ".join(map(repr, enough))
            raise AdapterError(f"capabilities()[{key!r}] must hold {needed}, the core; got {checked[key]!r}")
    for key in ("dtypes", "devices", "optimizer_state"):
        if not checked[key]:
            raise AdapterError(f"capabilities()[{key!r}] must name at least one of {everything()[key]}")
    if not {"float64", "float32"} & set(checked["dtypes"]):
        raise AdapterError("capabilities()['dtypes'] must hold float64 or float32: bfloat16 alone certifies nothing")
    return checked


def declares(capabilities: dict[str, Any], need: str) -> bool:
    """Whether `need` is met: "key" or "key:value" of a declaration; "options": something beyond the core, be it a
    second choice; "in process": the port lives in the suite's own process, which the suite notes in `capabilities`."""
    if need == "in process":
        return capabilities.get(need, True)
    if need == "options":
        return any(len(capabilities[key]) > least for key, least in CORE_CHOICES.items()) or any(
            capabilities[key] for key, choices in CAPABILITIES.items() if choices is bool
        )
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
            "window": NEVER_FULL,
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
