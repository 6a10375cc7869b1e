"""GXPO in plain numpy, float64: the definition of the method, written to be read and ported, not to be fast.

One active step, three gradients of the same batch (U: the optimizer; c: clip factors; r, q: per coordinate):

    g0 = grad L(theta0)                          theta1, s1 = U(theta0, s0, c0 g0)
    g1 = grad L(theta1)                          theta2, s2 = U(theta1, s1, c1 g1)
    r  = (c1 g1) / (c0 g0)                       how much of its gradient a coordinate keeps over one step
    q  = S_K(r) / S_2(r)                         how much further K steps go than two, S_n(r) = 1 + r + ... + r^(n-1)
    thetaK = theta0 + q (theta2 - theta0)        the virtual K-step point
    theta~ = theta0 + alpha (thetaK - theta0)    the partial move
    g~ = grad L(theta~)                          theta', s' = U(theta~, s0 or s2, c~ g~)

A gate (oracle_gate.py) watches one number per active step; once it trips, every step is the ordinary one-pass
U(theta0, s0, c0 g0).
Everything below is a function from old values to new ones; `Oracle.step` stores its results in one place, at its end,
so that an exception or a rollback has nothing to undo.

    oracle = Oracle({"w": np.array([1.0, -2.0])}, config)
    trace = oracle.step(lambda params: (loss, {"w": gradient}))
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from gxpo_reference.oracle_gate import NO_GATE, Gate, observe, why_closed

Arrays = dict[str, np.ndarray]
Gradient = Callable[[Arrays], tuple[float, Arrays]]  # the loss and its gradient at a point

# ---- The maths ------------------------------------------------------------------------------------------------------
# Overflow is silent throughout: a ratio or a sum that overflows has a rule, a point that does shows in its gradient.


@np.errstate(all="ignore")
def geometric_sum(r: Any, n: int) -> np.ndarray:
    """S_n(r) = 1 + r + ... + r^(n-1), summed: the closed form (1 - r^n) / (1 - r) loses r = 1."""
    r = np.asarray(r, dtype=np.float64)
    total = np.ones_like(r) if n else np.zeros_like(r)
    for _ in range(n - 1):
        total = 1.0 + r * total
    return np.asarray(total)


@np.errstate(all="ignore")
def extrapolation_scale(r: Any, horizon: int) -> np.ndarray:
    """q = S_K(r) / S_2(r), clamped to [1, K/2 + 1].

    1 + r divides out. Even K: S_K(r) = (1 + r) S_{K/2}(r^2). Odd K: one term is left over,
    S_K(r) = (1 + r) S_{(K-1)/2}(r^2) + r^(K-1), and r = -1 is a true pole: neutral there, q = 1.
    """
    _check("horizon", horizon, "an int >= 2")
    r = np.asarray(r, dtype=np.float64)
    r2 = r * r
    q = geometric_sum(r2, horizon // 2)
    if horizon % 2:
        q = q + r2 ** (horizon // 2) / (1.0 + r)
        # Below -1, S_K > 0 > S_2 and the clamp gives 1. Said outright, because a large K makes the sum inf - inf.
        q = np.where((r < -1.0) | (np.abs(1.0 + r) <= 1e-8), 1.0, q)
    return np.asarray(np.clip(q, 1.0, horizon / 2 + 1.0))


@np.errstate(all="ignore")
def retention_ratio(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r = after / before, clamped to [-2, 3], and which coordinates of this tensor take part; elsewhere r is 0.0.

    A coordinate far below its tensor's RMS is noise over noise, so it does not take part.
    """
    ratio = after / before
    rms = global_norm({"": before}) / math.sqrt(max(before.size, 1))
    takes_part = np.asarray((np.abs(before) > 1e-3 * rms) & np.isfinite(ratio))
    return np.asarray(np.clip(np.where(takes_part, ratio, 0.0), -2.0, 3.0)), takes_part


@np.errstate(all="ignore")
def tensor_ratio(u0: np.ndarray, u1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One r for the whole tensor, <u0, u1> / <u0, u0>, broadcast; u0 = 0 or a non-finite ratio takes no part."""
    e = _exponent(u0)
    v0, v1 = np.ldexp(u0, -e), np.ldexp(u1, -e)
    ratio = float(np.sum(v0 * v1) / np.sum(v0 * v0))
    takes_part = math.isfinite(ratio)
    return np.full(u0.shape, min(max(ratio, -2.0), 3.0) if takes_part else 0.0), np.full(u0.shape, takes_part)


@np.errstate(all="ignore")
def global_norm(arrays: Arrays) -> float:
    """The Euclidean norm over all tensors together."""
    flat = np.concatenate([np.zeros(0), *(a.ravel() for a in arrays.values())])
    e = _exponent(flat)
    return float(np.ldexp(np.sqrt(np.sum(np.ldexp(flat, -e) ** 2)), e))


def _exponent(a: np.ndarray) -> int:
    # To scale by 2^-e before squaring is exact, and keeps 1e-200 from squaring to 0: a tiny gradient is not a zero one.
    return math.frexp(np.max(np.abs(a), initial=0.0))[1]


def cosine(a: Arrays, b: Arrays) -> float:
    """cos(a, b) over all tensors together; 0 when one of them is zero."""
    norm_a, norm_b = global_norm(a), global_norm(b)
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0
    return float(sum(np.sum((a[name] / norm_a) * (b[name] / norm_b)) for name in a))


def per_tensor(f: Callable[..., Any], *args: Arrays) -> Arrays:
    """f applied tensor by tensor (asarray: arithmetic on 0-d arrays returns scalars)."""
    return {name: np.asarray(f(*(a[name] for a in args)), dtype=np.float64) for name in args[0]}


# ---- Optimizers, by torch.optim's definitions: U(theta, s, g) -> theta', s'. A fresh state is {}. --------------------


def sgd(theta: Arrays, s: dict, g: Arrays, *, lr: float, momentum: float, weight_decay: float) -> tuple[Arrays, dict]:
    """L2 weight decay joins the gradient; momentum without dampening, its first buffer is the gradient itself."""
    d = per_tensor(lambda t, g: g + weight_decay * t, theta, g)
    if momentum:
        if "momentum_buffer" in s:
            d = per_tensor(lambda b, d: momentum * b + d, s["momentum_buffer"], d)
        s = {"momentum_buffer": d}
    return per_tensor(lambda t, d: t - lr * d, theta, d), s


def adamw(
    theta: Arrays, s: dict, g: Arrays, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[Arrays, dict]:
    """Bias-corrected moments, eps outside the square root, weight decay apart from the gradient."""
    beta1, beta2 = betas
    zeros = per_tensor(np.zeros_like, theta)
    n = s.get("step", 0) + 1
    m = per_tensor(lambda m, g: beta1 * m + (1 - beta1) * g, s.get("exp_avg", zeros), g)
    v = per_tensor(lambda v, g: beta2 * v + (1 - beta2) * g * g, s.get("exp_avg_sq", zeros), g)

    def update(t: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        m_hat, v_hat = m / (1 - beta1**n), v / (1 - beta2**n)
        return t - lr * weight_decay * t - lr * m_hat / (np.sqrt(v_hat) + eps)

    return per_tensor(update, theta, m, v), {"step": n, "exp_avg": m, "exp_avg_sq": v}


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}

# ---- The step -------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """Everything one outer step asked, received and computed; copies, so it stays true when later steps run."""

    step: int  # outer step number, from 0
    outcome: str = "active"  # "active" | "single" | "rolled back" | "skipped"
    why: str = ""  # a short reason when not active
    passes: int = 0
    asked: list[Arrays] = field(default_factory=list)  # points at which a gradient was asked, in order
    losses: list[float] = field(default_factory=list)
    grads: list[Arrays] = field(default_factory=list)  # as received, unclipped
    norms: list[float] = field(default_factory=list)  # unclipped global norms
    clips: list[float] = field(default_factory=list)  # c0, c1, c~ (those that were computed)
    points: dict[str, Arrays] = field(default_factory=dict)  # of theta0, theta1, theta2, thetaK, theta~, theta'
    r: Arrays | None = None  # 0.0 where a coordinate takes no part
    takes_part: dict[str, np.ndarray] | None = None  # bool masks
    q: Arrays | None = None
    statistic: float | None = None  # h, where the gate observed one
    baseline: tuple[float, float] | None = None  # (mu, sigma) that scored h
    z: float | None = None
    streak: int = 0  # after this step's observation (patience on the step that trips)
    tripped: bool = False  # the gate closed at this step
    states: dict[str, dict] = field(default_factory=dict)  # of s0, s1, s2, s'


class Oracle:
    """GXPO over named float64 arrays; `config` as the conformance suite writes it."""

    def __init__(self, params: Arrays, config: dict) -> None:
        check_config(config)
        self.config = copy.deepcopy(config)
        self.rules = NO_GATE if config["gate"] is None else self.config["gate"]
        settings = {key: value for key, value in self.config["optimizer"].items() if key != "name"}
        self.U = partial(OPTIMIZERS[config["optimizer"]["name"]], **settings)
        self.params = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
        self.state: dict = {}  # the optimizer's
        self.gate = Gate()
        self.steps = 0  # outer steps completed, of any outcome

    def step(self, grad: Gradient, supplied: float | None = None) -> Trace:
        """One outer step. `supplied`: the caller's measurement at theta0, for the gate that reads that."""
        callers = np.geterr()  # numpy warns of nothing in here, but of what the loss does as its author likes

        def gradient(params: Arrays) -> tuple[float, Arrays]:
            with np.errstate(**callers):
                return grad(params)

        with np.errstate(all="ignore"):
            return self._step(gradient, supplied)

    def _step(self, grad: Gradient, supplied: float | None) -> Trace:
        U, K, alpha, statistic = self.U, self.config["horizon"], self.config["alpha"], self.rules["statistic"]
        theta0, s0 = self.params, self.state
        closed = why_closed(self.gate, self.rules, self.steps)
        watching = not closed and statistic != "never" and self.steps >= self.rules["warmup"]
        if watching and statistic == "supplied":
            _check("supplied", supplied, "a finite number")
        trace = Trace(self.steps, points={"theta0": theta0}, states={"s0": s0}, streak=self.gate.streak)

        def ask(point: Arrays) -> Arrays | None:
            """The clipped gradient at `point`, or None where the pass is not finite."""
            loss, received = grad(per_tensor(np.copy, point))  # copies both ways: a loss may work in place
            g, loss = self._like_params(received), float(loss)
            norm, C = global_norm(g), self.config["max_grad_norm"]
            trace.passes += 1
            trace.asked.append(point)
            trace.losses.append(loss)
            trace.grads.append(g)
            trace.norms.append(norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                trace.why = f"non-finite {'gradient' if math.isfinite(loss) else 'loss'} in pass {trace.passes}"
                return None
            c = 1.0 if C is None else min(1.0, C / (norm + 1e-6))
            trace.clips.append(c)
            return per_tensor(lambda g: c * g, g)

        def finish(outcome: str, theta: Arrays, s: dict, gate: Gate) -> Trace:
            trace.outcome = outcome
            if outcome != "skipped":
                trace.points["theta'"], trace.states["s'"] = theta, s
            # The trace is the caller's from here on, so what the next step starts from is a copy.
            self.params, self.state = per_tensor(np.copy, theta), copy.deepcopy(s)
            self.gate, self.steps = gate, self.steps + 1
            return trace

        if (c0_g0 := ask(theta0)) is None:
            return finish("skipped", theta0, s0, self.gate)
        theta1, s1 = U(theta0, s0, c0_g0)
        if closed or trace.norms[0] == 0.0:  # zero: all advantages were, so nothing to extrapolate or observe
            trace.why = closed or "zero gradient"
            return finish("single", theta1, s1, self.gate)

        trace.points["theta1"], trace.states["s1"] = theta1, s1
        if (c1_g1 := ask(theta1)) is None:  # theta1 is the single-pass step from theta0, s0 with c0 g0
            return finish("rolled back", theta1, s1, self.gate)
        theta2, s2 = U(theta1, s1, c1_g1)
        trace.points["theta2"], trace.states["s2"] = theta2, s2

        u0, u1 = per_tensor(np.subtract, theta1, theta0), per_tensor(np.subtract, theta2, theta1)
        ratio, before, after = {
            "gradient": (retention_ratio, c0_g0, c1_g1),  # what the optimizer was given, not what the loss returned
            "displacement": (retention_ratio, u0, u1),
            "tensor": (tensor_ratio, u0, u1),
        }[self.config["estimator"]]
        pairs = {name: ratio(before[name], after[name]) for name in theta0}
        trace.r = {name: r for name, (r, _) in pairs.items()}
        trace.takes_part = {name: mask for name, (_, mask) in pairs.items()}
        trace.q = per_tensor(lambda r, mask: np.where(mask, extrapolation_scale(r, K), 1.0), trace.r, trace.takes_part)

        thetaK = per_tensor(lambda t0, t2, q: t0 + q * (t2 - t0), theta0, theta2, trace.q)
        theta_ = per_tensor(lambda t0, tK: t0 + alpha * (tK - t0), theta0, thetaK)
        trace.points["thetaK"], trace.points["theta~"] = thetaK, theta_
        if (c_g := ask(theta_)) is None:
            return finish("rolled back", theta1, s1, self.gate)
        end, s_end = U(theta_, s2 if self.config["optimizer_state"] == "keep" else s0, c_g)

        gate = replace(self.gate, completed=self.gate.completed + 1)
        if watching:
            gate, fields = observe(gate, self.rules, self.steps, self._statistic(trace, supplied))
            trace = replace(trace, **fields)
        return finish("active", end, s_end, gate)

    def _statistic(self, trace: Trace, supplied: float | None) -> float:
        # The norms before clipping: after it they saturate at C, and the gate goes blind.
        match self.rules["statistic"]:
            case "corrective_norm":
                return trace.norms[2]
            case "initial_norm":
                return trace.norms[0]
            case "disagreement":
                return 1.0 - abs(cosine(trace.grads[0], trace.grads[2]))
        assert supplied is not None  # checked before the first pass
        return float(supplied)

    def save(self) -> dict:
        """Everything that later steps depend on, deep-copied."""
        saved = {"steps": self.steps, "params": self.params, "optimizer": self.state, "gate": vars(self.gate)}
        return copy.deepcopy(saved)

    def load(self, saved: dict) -> None:
        """Go on from what `save` returned, under the same config."""
        saved = copy.deepcopy(saved)
        params, gate = self._like_params(saved["params"]), Gate(**saved["gate"])
        self.params, self.state, self.gate, self.steps = params, saved["optimizer"], gate, saved["steps"]

    def _like_params(self, arrays: Arrays) -> Arrays:
        got = {name: np.array(value, dtype=np.float64) for name, value in arrays.items()}
        shapes, wanted = ({name: a.shape for name, a in each.items()} for each in (got, self.params))
        if shapes != wanted:
            raise ValueError(f"names and shapes must be those of the parameters, {wanted}, got {shapes}")
        return {name: got[name] for name in self.params}


# ---- Configuration: every key is sent; a bound is checked by its own words, a tuple lists the choices ---------------


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


BOUNDS: dict[str, Callable[[Any], bool]] = {
    "an int >= 0": lambda v: _is_int(v) and v >= 0,
    "an int >= 1": lambda v: _is_int(v) and v >= 1,
    "an int >= 2": lambda v: _is_int(v) and v >= 2,
    "a finite number": _is_finite,
    "a finite number >= 0": lambda v: _is_finite(v) and v >= 0,
    "a finite number > 0": lambda v: _is_finite(v) and v > 0,
    "a number in (0, 1]": lambda v: _is_finite(v) and 0 < v <= 1,
    "a number in [0, 1)": lambda v: _is_finite(v) and 0 <= v < 1,
    "two numbers in [0, 1)": lambda v: (
        isinstance(v, list | tuple) and len(v) == 2 and all(map(BOUNDS["a number in [0, 1)"], v))
    ),
    "true or false": lambda v: isinstance(v, bool),
    "a dict": lambda v: isinstance(v, dict),
}
CONFIG: dict[str, Any] = {
    "horizon": "an int >= 2",
    "alpha": "a finite number >= 0",
    "estimator": ("gradient", "displacement", "tensor"),
    "optimizer_state": ("restore", "keep"),
    "max_grad_norm": "a finite number > 0 or None",
    "gate": "a dict or None",
    "optimizer": "a dict",
}
GATE: dict[str, Any] = {
    "statistic": ("corrective_norm", "initial_norm", "disagreement", "supplied", "never"),
    "baseline": ("window", "ema"),
    "window": "an int >= 2",
    "omega": "a number in (0, 1]",
    "threshold": "a finite number > 0",
    "patience": "an int >= 1",
    "two_sided": "true or false",
    "warmup": "an int >= 0",
    "cooldown": "an int >= 0 or None",
    "max_active_steps": "an int >= 0 or None",
}
OPTIMIZER: dict[str, Any] = {
    "name": tuple(OPTIMIZERS),
    "lr": "a finite number >= 0",
    "weight_decay": "a finite number >= 0",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": "a finite number >= 0"},
    "adamw": {"betas": "two numbers in [0, 1)", "eps": "a finite number >= 0"},
}


def check_config(config: dict) -> None:
    """ValueError with the key, the bound and the value received."""
    _check("config", config, "a dict")
    _check_keys("", config, CONFIG)
    optimizer, gate = config["optimizer"], config["gate"]
    _check("optimizer.name", optimizer.get("name"), OPTIMIZER["name"])
    _check_keys("optimizer.", optimizer, OPTIMIZER | SETTINGS[optimizer["name"]])
    if gate is not None:
        unread = "omega" if gate.get("baseline") == "window" else "window"  # each baseline has its own constant
        _check_keys("gate.", gate, GATE, optional=(unread,))


def _check_keys(prefix: str, given: dict, schema: dict[str, Any], optional: tuple[str, ...] = ()) -> None:
    if unknown := [key for key in given if key not in schema]:
        raise ValueError(f"unknown key {prefix}{unknown[0]}; the keys are {', '.join(schema)}")
    if missing := [key for key in schema if key not in given and key not in optional]:
        raise ValueError(f"missing key {prefix}{missing[0]}; it must be {schema[missing[0]]}")
    for key, value in given.items():
        _check(prefix + key, value, schema[key])


def _check(key: str, value: Any, bound: str | tuple[str, ...]) -> None:
    if isinstance(bound, tuple):
        ok, bound = value in bound, "one of " + ", ".join(bound)
    else:
        ok = (value is None and bound.endswith(" or None")) or BOUNDS[bound.removesuffix(" or None")](value)
    if not ok:
        raise ValueError(f"{key} must be {bound}, got {value!r}")
