"""A right implementation of GXPO in small pieces, for mutants to get one of them wrong.

In the run's own dtype: float32 arithmetic in a float32 run; bfloat16 parameters are rounded where they are stored, all
else is float32. Written from SPEC.md, apart from the oracle and from gxpo.py. Two styles: `Functional` makes new arrays
and assigns at the end of a step; `InPlace` writes into its arrays as it goes and puts them back when a step fails.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gxpo_conformance.harness.findings import to_dtype
from gxpo_conformance.mutants.model_gate import ModelGate
from gxpo_conformance.protocol import DTYPES, Arrays, Config, Gradient, everything

State = dict[str, Any]

LEAST_MARGIN = 10.0  # tolerances; a case nearer to a wrong implementation proves nothing


class Failed(Exception):
    """A pass whose loss or gradient is not finite."""


class Functional(ModelGate):
    """One session; every method is a piece of the rule."""

    style = "functional"

    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        self.refuse(config)
        self.config, self.rules, self.dtype = config, config["gate"], dtype
        self.kind = np.float64 if dtype == "float64" else np.float32
        self.theta = {k: self.store(v) for k, v in params.items()}
        self.state: State = {}
        self.supplied: float | None = None
        self.gate = self.new_gate()

    def refuse(self, config: Config) -> None:
        if config["horizon"] < 2:
            raise ValueError(f"horizon must be >= 2, got {config['horizon']}")

    def store(self, values: np.ndarray) -> np.ndarray:
        """As a parameter is kept."""
        return to_dtype(values, self.dtype) if self.dtype == "bfloat16" else np.array(values, dtype=self.kind)

    # -- ratio and scale

    def active(self, before: np.ndarray) -> np.ndarray:
        """Which coordinates take part."""
        return np.abs(before) > 1e-3 * self.rms(before)

    def rms(self, before: np.ndarray) -> np.ndarray:
        return np.sqrt(np.sum(before * before) / max(before.size, 1))

    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        r = after / before
        return np.clip(np.where(np.isfinite(r), r, 0), -2, 3).astype(self.kind)

    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        """One r for all of a tensor; NaN where it did not move."""
        size = np.linalg.norm(u0)
        return np.full(u0.shape, np.clip(np.sum(u0 / size * (u1 / size)), -2, 3), dtype=self.kind)

    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        q = np.ones_like(r)
        for _ in range(K // 2 - 1):
            q = 1 + r * r * q
        if K % 2:
            q = np.where(self.at_the_pole(r), 1, q + r ** (K - 1) / (1 + r))
        return self.bound(q, K)

    def at_the_pole(self, r: np.ndarray) -> np.ndarray:
        """Where the sum of an odd K is neutral."""
        return r <= -1 + 1e-8

    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return np.clip(q, 1, K / 2 + 1).astype(self.kind)

    def inactive(self, K: int) -> float:
        return 1.0

    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        """q of every coordinate, from theta0, theta1, theta2 and the two gradients that the optimizer was given."""
        K, estimator = self.config["horizon"], self.config["estimator"]
        made = {}
        for k in theta[0]:
            u0, u1 = theta[1][k] - theta[0][k], theta[2][k] - theta[1][k]
            before, after = (g[0][k], g[1][k]) if estimator == "gradient" else (u0, u1)
            if estimator == "tensor":
                r = self.tensor_ratio(u0, u1)
                made[k] = np.where(np.isfinite(r), self.scale(np.nan_to_num(r), K), self.kind(1))
            else:
                q = self.scale(self.ratio(before, after), K)
                made[k] = np.where(self.active(before), q, self.kind(self.inactive(K)))
        return made

    # -- optimizer

    def clip(self, g: Arrays, norm: float) -> Arrays:
        c = self.coefficient(norm)
        return g if c == 1 else {k: v * self.kind(c) for k, v in g.items()}

    def coefficient(self, norm: float) -> float:
        C = self.config["max_grad_norm"]
        return 1.0 if C is None else min(1.0, C / (norm + 1e-6))

    def update(self, theta: Arrays, state: State, g: Arrays) -> tuple[Arrays, State]:
        """U(theta, s, g); new arrays."""
        o = self.config["optimizer"]
        return self.adamw(theta, state, g, o) if o["name"] == "adamw" else self.sgd(theta, state, g, o)

    def sgd(self, theta: Arrays, state: State, g: Arrays, o: dict[str, Any]) -> tuple[Arrays, State]:
        lr, mu, decay = (self.kind(o[k]) for k in ("lr", "momentum", "weight_decay"))
        d = {k: g[k] + decay * theta[k] for k in theta} if decay else g
        buffer = state.get("buffer")
        if mu:
            d = {k: mu * buffer[k] + d[k] for k in theta} if buffer else d
            state = {"buffer": d}
        return {k: self.store(theta[k] - lr * d[k]) for k in theta}, state

    def adamw(self, theta: Arrays, state: State, g: Arrays, o: dict[str, Any]) -> tuple[Arrays, State]:
        lr, eps, decay, (b1, b2) = o["lr"], o["eps"], o["weight_decay"], o["betas"]
        n = state.get("n", 0) + 1
        m = {k: b1 * state["m"][k] + (1 - b1) * v if state else (1 - b1) * v for k, v in g.items()}
        v = {k: b2 * state["v"][k] + (1 - b2) * a * a if state else (1 - b2) * a * a for k, a in g.items()}
        made, (c1, c2) = {}, self.corrections(n, b1, b2)
        for k, t in theta.items():
            made[k] = self.store(t * self.kept(lr, decay) - lr / c1 * m[k] / self.root(v[k], c2, eps))
        return made, {"n": n, "m": m, "v": v}

    def corrections(self, n: int, b1: float, b2: float) -> tuple[float, float]:
        """What AdamW's moments are divided by in its n-th step."""
        return 1 - b1**n, 1 - b2**n

    def root(self, v: np.ndarray, c2: float, eps: float) -> np.ndarray:
        return np.sqrt(v) / math.sqrt(c2) + eps

    def kept(self, lr: float, decay: float) -> float:
        """What AdamW's decay leaves of a parameter."""
        return 1 - lr * decay

    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        """theta~ from theta0 and theta2 (theta1, between them, for mutants)."""
        alpha = self.kind(self.config["alpha"])
        return {k: self.store(t + alpha * q[k] * (theta[2][k] - t)) for k, t in theta[0].items()}

    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        return s2 if self.config["optimizer_state"] == "keep" else s0

    # -- the step

    def step(self, grad: Gradient, statistic: float | None = None) -> None:
        self.supplied = statistic
        self.outer(grad)

    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        """(gradient, its norm) at `point`. Failed where the pass is not finite."""
        loss, g = grad(self.handed_out(point))
        norm = self.norm(g)
        if not self.finite(loss, g, norm):
            raise Failed
        return g, norm

    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return math.isfinite(loss) and math.isfinite(norm)

    def nothing(self, norm: float) -> bool:
        """Whether a gradient of this norm is a zero one."""
        return norm == 0

    def handed_out(self, point: Arrays) -> Arrays:
        return {k: v.copy() for k, v in point.items()}

    def norm(self, g: Arrays) -> float:
        return math.sqrt(sum(float(np.sum(v.astype(np.float64) ** 2)) for v in g.values()))

    @np.errstate(all="ignore")
    def outer(self, grad: Gradient) -> None:
        theta0, s0 = self.theta, self.state
        try:
            g0, n0 = self.ask(grad, theta0)
        except Failed:
            return self.counted("skipped")
        c0 = self.clip(g0, n0)
        theta1, s1 = self.update(theta0, s0, c0)
        if not self.open() or self.nothing(n0):
            self.theta, self.state = theta1, s1
            return self.counted("single")
        try:
            g1, n1 = self.ask(grad, theta1)
            c1 = self.clip(g1, n1)
            theta2, s2 = self.update(theta1, s1, c1)
            theta = [theta0, theta1, theta2]
            tilde = self.move(theta, self.scales(theta, [c0, c1]))
            g, n = self.ask(grad, tilde)
        except Failed:
            self.theta, self.state = theta1, s1
            return self.counted("rolled back")
        self.theta, self.state = self.update(tilde, self.state_of_the_last_step(s0, s2), self.clip(g, n))
        if self.watching():
            self.observe(self.statistic([g0, g1, g], [n0, n1, n]))
        return self.counted("active")

    def params(self) -> Arrays:
        return {k: v.copy() for k, v in self.theta.items()}

    def save(self) -> Any:
        return copy.deepcopy({"theta": self.theta, "state": self.state, "gate": self.gate})

    def load(self, saved: Any) -> None:
        saved = copy.deepcopy(saved)
        self.theta, self.state, self.gate = saved["theta"], saved["state"], saved["gate"]


class InPlace(Functional):
    """The same rule, writing into one set of arrays as it goes, with a copy to go back to."""

    style = "in place"
    first: tuple[Arrays, float] | None = None  # g0 and its norm, once there

    @np.errstate(all="ignore")
    def outer(self, grad: Gradient) -> None:
        before = self.copies()
        self.first = None
        try:
            outcome = self.passes(grad, before)
        except Failed:
            self.roll_back(before)
            outcome = self.start_over()
        except BaseException:
            self.roll_back(before)
            raise
        self.counted(outcome)

    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        self.first = (g0, n0) = self.ask(grad, self.theta)
        c0 = self.clip(g0, n0)
        single = not self.open() or self.nothing(n0)
        self.advance(c0)
        if single:
            return "single"
        theta1, _ = self.copies()
        g1, n1 = self.ask(grad, self.theta)
        c1 = self.clip(g1, n1)
        self.advance(c1)
        theta = [before[0], theta1, self.copies()[0]]
        self.write(self.move(theta, self.scales(theta, [c0, c1])))
        self.put_state(self.state_of_the_last_step(copy.deepcopy(before[1]), self.state))
        g, n = self.ask(grad, self.theta)
        self.advance(self.clip(g, n))
        if self.watching():
            self.observe(self.statistic([g0, g1, g], [n0, n1, n]))
        return "active"

    def start_over(self) -> str:
        """After a failed pass: nothing where it was the first, else the single-pass step."""
        if self.first is None:
            return "skipped"
        self.advance(self.clip(*self.first))
        return "rolled back"

    def advance(self, g: Arrays) -> None:
        theta, state = self.update(self.theta, self.state, g)
        self.write(theta)
        self.put_state(state)

    def write(self, theta: Arrays) -> None:
        for k, v in theta.items():
            self.theta[k][...] = v

    def put_state(self, state: State) -> None:
        self.state = state

    def copies(self) -> tuple[Arrays, State]:
        return {k: v.copy() for k, v in self.theta.items()}, copy.deepcopy(self.state)

    def roll_back(self, before: tuple[Arrays, State]) -> None:
        self.write(before[0])
        self.put_state(copy.deepcopy(before[1]))


class ModelPort:
    """The adapter of a session class."""

    time_limit = None  # known to come to an end; the suite need not watch

    def __init__(self, kind: type[Functional], name: str) -> None:
        self.kind, self.name = kind, name

    def capabilities(self) -> dict[str, Any]:
        return {**everything(), "devices": ["cpu"]}

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Functional:
        return self.kind(params, config, dtype)


@dataclass(frozen=True)
class Mutant:
    """An implementation that is wrong in one way."""

    id: str
    does: str  # completes "the implementation that ..."
    clauses: tuple[str, ...]  # those that are about this mistake: each must reject it
    source: str  # where the mistake is known from; "" where it is made up
    kind: type[Functional]
    shows: tuple[str, ...] = DTYPES  # dtypes that can show it

    @property
    def style(self) -> str:
        return self.kind.style

    def port(self) -> ModelPort:
        return ModelPort(self.kind, f"mutant {self.id}")


MUTANTS: dict[str, Mutant] = {}


def mutant(
    name: str, does: str, *clauses: str, source: str = "", shows: tuple[str, ...] = DTYPES
) -> Callable[[type[Functional]], type[Functional]]:
    """Register a session class under `name`."""

    def register(kind: type[Functional]) -> type[Functional]:
        if name in MUTANTS:
            raise ValueError(f"two mutants are called {name}")
        MUTANTS[name] = Mutant(name, does, clauses, source, kind, shows)
        return kind

    return register
