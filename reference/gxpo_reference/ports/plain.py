"""GXPO in plain numpy with every option, the way most frameworks would have it: in place.

    gxpo-conformance --impl gxpo_reference.ports.plain:Port

PORTING.md's port, completed. theta and the optimizer's moments are arrays that a step changes where they are, so a step
that fails has something to undo: it goes back to a snapshot. The letters are SPEC.md's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Gradient = Callable[[Arrays], tuple[float, Arrays]]  # parameters -> the loss there and its gradient
Config = dict[str, Any]


def copies(arrays: Arrays) -> Arrays:
    return {k: np.array(v) for k, v in arrays.items()}


def dot(a: Arrays, b: Arrays) -> float:
    """Over all tensors together, summed in float64."""
    return float(sum(np.sum(a[k].astype(np.float64) * b[k].astype(np.float64)) for k in a))


# ---- The ratio and what follows from it ------------------------------------------------------------------------------


def retention_ratio(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """after / before; 0, for which q is 1, where `before` is next to nothing beside the rest of its tensor."""
    rms = math.sqrt(dot({"": before}, {"": before}) / max(before.size, 1))
    takes_part = np.abs(before) > 1e-3 * rms
    ratio = np.where(takes_part, after / np.where(takes_part, before, 1), 0)
    return np.where(np.isfinite(ratio), ratio, 0)


def tensor_ratio(u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
    """One for the whole tensor; 0 where it did not move."""
    size = dot({"": u0}, {"": u0})
    ratio = dot({"": u0}, {"": u1}) / size if size > 0 else 0.0
    return np.full_like(u0, ratio if math.isfinite(ratio) else 0.0)


def extrapolation_scale(r: np.ndarray, K: int) -> np.ndarray:
    """q = S_K(r) / S_2(r), with 1 + r divided out: 1 + r^2 + r^4 + ..."""
    r = np.clip(r, -2, 3)
    q = np.ones_like(r)
    for n in range(1, K // 2):
        q = q + r ** (2 * n)
    if K % 2:  # one term is left over, and r = -1 is a pole
        pole = r <= -1 + 1e-8
        q = np.where(pole, 1, q + r ** (K - 1) / np.where(pole, 1, 1 + r))
    return np.clip(q, 1, K / 2 + 1)


# ---- The optimizers of torch.optim -----------------------------------------------------------------------------------


class SGD:
    def __init__(self, theta: Arrays, lr: float, momentum: float, weight_decay: float) -> None:
        self.theta, self.lr, self.momentum, self.weight_decay = theta, lr, momentum, weight_decay
        self.state: dict[str, Any] = {"m": {k: np.zeros_like(v) for k, v in theta.items()}}

    def apply(self, g: Arrays) -> None:
        for k, t in self.theta.items():
            m = self.state["m"][k]
            m[...] = self.momentum * m + g[k] + self.weight_decay * t
            t -= self.lr * m


class AdamW:
    def __init__(self, theta: Arrays, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.theta, self.lr, self.betas, self.eps, self.weight_decay = theta, lr, betas, eps, weight_decay
        m, v = ({k: np.zeros_like(t) for k, t in theta.items()} for _ in range(2))
        self.state: dict[str, Any] = {"n": 0, "m": m, "v": v}

    def apply(self, g: Arrays) -> None:
        beta1, beta2 = self.betas
        self.state["n"] += 1
        n = self.state["n"]
        for k, t in self.theta.items():
            m, v = self.state["m"][k], self.state["v"][k]
            m[...] = beta1 * m + (1 - beta1) * g[k]
            v[...] = beta2 * v + (1 - beta2) * g[k] ** 2
            t *= 1 - self.lr * self.weight_decay
            t -= self.lr * (m / (1 - beta1**n)) / (np.sqrt(v / (1 - beta2**n)) + self.eps)


OPTIMIZERS = {"sgd": SGD, "adamw": AdamW}

# ---- The gate --------------------------------------------------------------------------------------------------------


class Gate:
    def __init__(self, rules: Config) -> None:
        self.rules = rules
        self.steps = 0  # completed ones, of any kind
        self.active_steps = 0
        self.observed = 0
        self.recent: list[float] = []  # the latest observations, no more than the window holds
        self.mean, self.variance = 1.0, 1.0  # of the ema baseline
        self.streak = 0  # surprising observations in a row
        self.pinned: tuple[float, float] | None = None  # what scored the first of them
        self.opens_at = 0.0  # the first step that may be active

    def is_open(self) -> bool:
        budget = self.rules["max_active_steps"]
        return self.steps >= self.opens_at and (budget is None or self.active_steps < budget)

    def baseline(self) -> tuple[float, float] | None:
        """Mean and deviation of what was observed; None where that is too little."""
        if self.rules["baseline"] == "ema":
            return None if self.observed < 2 else (self.mean, max(math.sqrt(self.variance), 0.01))
        if len(self.recent) < self.rules["window"]:
            return None
        return float(np.mean(self.recent)), float(np.std(self.recent))

    def completed(self, h: float | None) -> None:
        """A step is completed. `h`: what an active one shows."""
        if h is not None:
            self.active_steps += 1
            if self.rules["statistic"] != "never" and self.steps >= self.rules["warmup"]:
                self.observe(h)
        self.steps += 1

    def observe(self, h: float) -> None:
        baseline = self.pinned or self.baseline()
        surprising = False
        if baseline is not None:
            z = (h - baseline[0]) / (baseline[1] + 1e-9)
            surprising = (abs(z) if self.rules["two_sided"] else z) >= self.rules["threshold"]
        self.remember(h)
        self.streak = self.streak + 1 if surprising else 0
        if self.streak >= self.rules["patience"]:
            cooldown = self.rules["cooldown"]
            self.opens_at = math.inf if cooldown is None else self.steps + 1 + cooldown
            self.streak = 0
        self.pinned = baseline if self.streak else None

    def remember(self, h: float) -> None:
        omega, away = self.rules["omega"], h - self.mean
        self.observed += 1
        self.recent = [*self.recent, h][-self.rules["window"] :]
        self.variance = (1 - omega) * self.variance + omega * away**2
        self.mean = (1 - omega) * self.mean + omega * h


# ---- The step --------------------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """A gradient as it came, its norm, and what the optimizer gets of it."""

    g: Arrays
    norm: float
    given: Arrays


class GXPO:
    def __init__(self, theta: Arrays, config: Config) -> None:
        if config["horizon"] < 2:
            raise ValueError(f"horizon must be >= 2, got {config['horizon']}")
        self.theta, self.config = copies(theta), config
        base = dict(config["optimizer"])
        self.optimizer = OPTIMIZERS[base.pop("name")](self.theta, **base)
        self.gate = Gate(config["gate"])

    def snapshot(self) -> tuple[Arrays, dict[str, Any]]:
        return copies(self.theta), copy.deepcopy(self.optimizer.state)

    def restore(self, snapshot: tuple[Arrays, dict[str, Any]]) -> None:
        self.put(snapshot[0])
        self.optimizer.state = copy.deepcopy(snapshot[1])

    def put(self, theta: Arrays) -> None:
        for k, t in self.theta.items():
            t[...] = theta[k]

    def step(self, grad: Gradient, supplied: float | None = None) -> None:
        before = self.snapshot()
        try:
            with np.errstate(all="ignore"):
                h = self.moved(grad, before, supplied)
        except BaseException:  # Ctrl-C as well
            self.restore(before)
            raise
        self.gate.completed(h)

    def moved(self, grad: Gradient, before: tuple[Arrays, dict[str, Any]], supplied: float | None) -> float | None:
        """theta and the optimizer moved on by one step. What the gate may see of an active one; None: it was none."""
        theta0, s0 = before
        first = self.ask(grad)
        if first is None:
            return None
        self.optimizer.apply(first.given)
        if not self.gate.is_open() or first.norm == 0:
            return None
        single = self.snapshot()  # where a single pass ends
        second = self.ask(grad)
        if second is None:
            return None
        self.optimizer.apply(second.given)
        q = self.scale(theta0, single[0], first, second)
        self.put({k: theta0[k] + self.config["alpha"] * q[k] * (t - theta0[k]) for k, t in self.theta.items()})
        third = self.ask(grad)
        if third is None:
            self.restore(single)
            return None
        if self.config["optimizer_state"] == "restore":
            self.optimizer.state = copy.deepcopy(s0)
        self.optimizer.apply(third.given)
        return self.statistic(first, third, supplied)

    def ask(self, grad: Gradient) -> Pass | None:
        """The gradient where theta is; None where it or the loss is not finite."""
        loss, g = grad(copies(self.theta))
        norm, C = math.sqrt(dot(g, g)), self.config["max_grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        c = 1.0 if C is None else min(1.0, C / (norm + 1e-6))
        return Pass(g, norm, {k: c * v for k, v in g.items()})

    def scale(self, theta0: Arrays, theta1: Arrays, first: Pass, second: Pass) -> Arrays:
        """q of every coordinate; theta is at theta2."""
        before, after = first.given, second.given
        if self.config["estimator"] != "gradient":
            before = {k: theta1[k] - theta0[k] for k in theta0}
            after = {k: t - theta1[k] for k, t in self.theta.items()}
        ratio = tensor_ratio if self.config["estimator"] == "tensor" else retention_ratio
        return {k: extrapolation_scale(ratio(before[k], after[k]), self.config["horizon"]) for k in theta0}

    def statistic(self, first: Pass, third: Pass, supplied: float | None) -> float:
        """h, before clipping."""
        match self.config["gate"]["statistic"]:
            case "initial_norm":
                return first.norm
            case "disagreement":
                return 1 - (abs(dot(first.g, third.g)) / (first.norm * third.norm) if third.norm > 0 else 0.0)
            case "supplied" if supplied is not None:
                return supplied
        return third.norm


# ---- Under the suite -------------------------------------------------------------------------------------------------


class Port:
    name = "plain.py"

    def capabilities(self) -> dict[str, Any]:
        return {
            "dtypes": ["float64", "float32"],
            "devices": ["cpu"],
            "optimizers": ["sgd", "adamw"],
            "estimators": ["gradient", "displacement", "tensor"],
            "optimizer_state": ["keep", "restore"],
            "gate_statistics": ["corrective_norm", "initial_norm", "disagreement", "supplied", "never"],
            "gate_baselines": ["window", "ema"],
            "gate_options": ["patience", "two_sided", "warmup", "cooldown", "max_active_steps"],
            "max_grad_norm": True,
            "checkpoint": True,
            "nonfinite_gradients": True,
            "nonfinite_losses": True,
            "exceptions": True,
        }

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        return Session(GXPO(params, config))


class Session:
    def __init__(self, gxpo: GXPO) -> None:
        self.gxpo = gxpo

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        self.gxpo.step(grad, statistic)

    def params(self) -> Arrays:
        return copies(self.gxpo.theta)

    def save(self) -> dict[str, Any]:
        remembered = {k: v for k, v in vars(self.gxpo.gate).items() if k != "rules"}
        return copy.deepcopy({"optimizer": self.gxpo.optimizer.state, "gate": remembered})

    def load(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.gxpo.optimizer.state = saved["optimizer"]
        vars(self.gxpo.gate).update(saved["gate"])
