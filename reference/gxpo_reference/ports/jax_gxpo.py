"""GXPO for JAX: around any optax optimizer, over any pytree of parameters.

    gxpo = GXPO(optax.adamw(1e-6), horizon=5, alpha=0.5, max_grad_norm=1.0)
    state = gxpo.init(params)

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))       # compiled once; do not donate the parameters to it
    for batch in batches:                                       # old log-probabilities fixed for all three passes
        params, state, report = gxpo.step(params, state, partial(value_and_grad, batch=batch))

`value_and_grad(params)` is called three times while active and once after fallback. Nothing is changed in place: a step
returns new parameters and a new state, so one that raises, or meets a non-finite gradient, has nothing to roll back.
(Donated buffers would be gone when it does.) To save: `state.optimizer` is optax's pytree, `state.gate` plain numbers.

Rules and clause numbers: the suite's SPEC.md. `gxpo-conformance --impl gxpo_reference.ports.jax_adapter:Port` judges
it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any  # of arrays
ValueAndGrad = Callable[[Tree], tuple[float, Tree]]


# ---- The mathematics: one tensor's arrays in, one out ---------------------------------------------------------------


def extrapolation_scale(r: jax.Array, horizon: int) -> jax.Array:
    """q = S_K(r) / S_2(r) with S_n(r) = 1 + r + ... + r^(n-1), clamped to [1, K/2 + 1] (EXT-01 to EXT-05).

    1 + r is divided out: 1 + r^2 + r^4 + ..., and for odd K the last power over 1 + r, where r = -1 is a pole.
    """
    q = jnp.ones_like(r)
    for _ in range(horizon // 2 - 1):
        q = 1 + r * r * q
    if horizon % 2:
        pole = r <= -1 + 1e-8  # below it the sum is negative, and the clamp would make it 1 as well
        q = jnp.where(pole, 1, q + r ** (horizon - 1) / jnp.where(pole, 1, 1 + r))
    return jnp.clip(q, 1, horizon / 2 + 1)


def by_coordinate(before: jax.Array, after: jax.Array, horizon: int) -> jax.Array:
    """q of each coordinate from r = after / before; 1 where it takes no part (EST-01, EST-02, EST-03)."""
    part = jnp.abs(before) > 1e-3 * jnp.sqrt(jnp.mean(before * before))
    r = jnp.where(part, after, 0) / jnp.where(part, before, 1)
    return extrapolation_scale(jnp.clip(jnp.where(jnp.isfinite(r), r, 0), -2, 3), horizon)  # EST-04


def by_tensor(u0: jax.Array, u1: jax.Array, horizon: int) -> jax.Array:
    """One q for the tensor, from the projection of u1 on u0; 1 where u0 is zero (EST-12 to EST-14)."""
    moved = jnp.sum(u0 * u0)
    r = jnp.where(moved > 0, jnp.sum(u0 * u1) / jnp.where(moved > 0, moved, 1), 0)
    return jnp.where(moved > 0, extrapolation_scale(jnp.clip(r, -2, 3), horizon), 1)


def wide(tree: Tree) -> Tree:
    """At least float32: what ratios, norms and moves are computed in."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


@functools.partial(jax.jit, static_argnames=("horizon", "estimator"))
def virtual_point(thetas: tuple, grads: tuple, alpha: float, *, horizon: int, estimator: str) -> tuple[Tree, jax.Array]:
    """(theta~ = theta0 + alpha q (theta2 - theta0), mean q), from theta0, theta1, theta2 and the clipped g0, g1."""
    theta0, theta1, theta2 = map(wide, thetas)
    u0 = jax.tree.map(jnp.subtract, theta1, theta0)
    u1 = jax.tree.map(jnp.subtract, theta2, theta1)
    before, after = map(wide, grads) if estimator == "gradient" else (u0, u1)
    rule = by_tensor if estimator == "tensor" else by_coordinate
    q = jax.tree.map(lambda a, b: rule(a, b, horizon), before, after)
    tilde = jax.tree.map(
        lambda p, t0, t2, q: (t0 + alpha * q * (t2 - t0)).astype(p.dtype), thetas[0], theta0, theta2, q
    )
    leaves = jax.tree.leaves(q)
    mean = sum(map(jnp.sum, leaves)) / max(sum(a.size for a in leaves), 1)  # a tensor may be empty
    return tilde, jnp.asarray(mean)


@jax.jit
def clipped(grads: Tree, norm: float, limit: float) -> Tree:
    """c g with c = min(1, C / (|g| + 1e-6)) (CLP-01)."""
    c = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g, w: (c * w).astype(g.dtype), grads, wide(grads))  # in bfloat16 c would be rounded, too


@jax.jit
def norms(grads: Tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(wide(grads))))


@jax.jit
def cosine(a: Tree, b: Tree) -> jax.Array:
    dot = sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(wide(a)), jax.tree.leaves(wide(b)), strict=True))
    return dot / (norms(a) * norms(b))


# What optax keeps of a schedule: an optimizer's, and inject_hyperparams', a type that optax does not export.
SCHEDULES = ("ScaleByScheduleState", "WrappedScheduleState")


def same_schedule(s: Tree, s0: Tree) -> Tree:
    """s with the schedules of s0: optax counts updates, but the learning rate advances once a step, not once a pass."""

    def counts(x: Any) -> bool:
        return type(x).__name__ in SCHEDULES

    return jax.tree.map(lambda now, then: then if counts(now) else now, s, s0, is_leaf=counts)


# ---- The gate: plain numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateState:
    step: int = 0  # outer steps done
    active_steps: int = 0
    closed_at: int | None = None
    streak: int = 0
    pinned: tuple[float, float] | None = None  # what scored the open streak's first member
    seen: int = 0  # observations
    history: tuple[float, ...] = ()  # the latest of them
    mean: float = 1.0  # of the ema
    variance: float = 1.0


@dataclass(frozen=True)
class Gate:
    """When to fall back to single passes. Names and meanings are gxpo.py's. ValueError for a value out of bounds."""

    statistic: str = "corrective_norm"  # or "initial_norm", "disagreement", "supplied", "never"
    baseline: str = "window"  # or "ema"
    window: int = 30
    omega: float = 0.1
    threshold: float = 3.0
    patience: int = 3
    two_sided: bool = False
    warmup: int = 0
    cooldown: int | None = None
    max_active_steps: int | None = None

    def __post_init__(self) -> None:
        if self.statistic not in ("corrective_norm", "initial_norm", "disagreement", "supplied", "never"):
            raise ValueError(f"no such statistic: {self.statistic!r}")
        if self.baseline not in ("window", "ema"):
            raise ValueError(f'baseline must be "window" or "ema", got {self.baseline!r}')
        if self.window < 1 or self.patience < 1:  # 0 would trip on anything
            raise ValueError(f"window and patience must be >= 1, got {self.window!r} and {self.patience!r}")

    def is_open(self, s: GateState) -> bool:
        if self.max_active_steps is not None and s.active_steps >= self.max_active_steps:
            return False  # for good (GAT-17, GAT-25)
        return s.closed_at is None or (self.cooldown is not None and s.step > s.closed_at + self.cooldown)

    def usual(self, s: GateState) -> tuple[float, float] | None:
        """(mu, sigma) of what came before, None while that is too little (GAT-02, GAT-04, GAT-18)."""
        if self.baseline == "ema":
            return (s.mean, max(math.sqrt(s.variance), 0.01)) if s.seen >= 2 else None
        return (statistics.fmean(s.history), statistics.pstdev(s.history)) if s.seen >= self.window else None

    def after(self, s: GateState, active: bool, h: float | None) -> GateState:
        """The state after one more step; h: what was observed in it, None for nothing."""
        if h is not None and s.step >= self.warmup:
            usual = s.pinned or self.usual(s)  # GAT-11
            z = None if usual is None else (h - usual[0]) / (usual[1] + 1e-9)
            surprising = z is not None and (abs(z) if self.two_sided else z) >= self.threshold
            streak = s.streak + 1 if surprising else 0
            trips = streak >= self.patience
            s = dataclasses.replace(
                s,
                closed_at=s.step if trips else s.closed_at,
                streak=0 if trips else streak,
                pinned=usual if surprising and not trips else None,
                seen=s.seen + 1,
                history=(*s.history, h)[-self.window :],
                mean=(1 - self.omega) * s.mean + self.omega * h,
                variance=(1 - self.omega) * s.variance + self.omega * (h - s.mean) * (h - s.mean),
            )
        return dataclasses.replace(s, step=s.step + 1, active_steps=s.active_steps + active)


# ---- The step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    optimizer: Tree  # optax's
    gate: GateState


@dataclass(frozen=True)
class Report:
    outcome: str  # "active", "single", "rolled back" or "skipped"
    passes: int
    loss: float  # of the first pass
    mean_q: float | None = None


@dataclass(frozen=True)
class Pass:
    loss: float
    grads: Tree
    norm: float  # before clipping: what the gate sees (CLP-03)
    given: Tree  # clipped: what the optimizer gets, and the ratio is made of (CLP-02)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class GXPO:
    """The update rule around `tx`. horizon: K, an int >= 2; alpha >= 0: part of the way to thetaK; estimator:
    "gradient", "displacement" or "tensor"; optimizer_state: "keep" or "restore"; max_grad_norm: C > 0, or None.
    ValueError for a value out of bounds. Holds no state: one serves any number of runs.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        *,
        horizon: int = 5,
        alpha: float = 0.5,
        estimator: str = "gradient",
        optimizer_state: str = "keep",
        max_grad_norm: float | None = None,
        gate: Gate = Gate(),
    ) -> None:
        if not isinstance(horizon, int) or horizon < 2:
            raise ValueError(f"horizon must be an int >= 2, got {horizon!r}")  # EXT-06
        if not alpha >= 0:
            raise ValueError(f"alpha must be a number >= 0, got {alpha!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be None or a number > 0, got {max_grad_norm!r}")
        if estimator not in ("gradient", "displacement", "tensor"):
            raise ValueError(f'estimator must be "gradient", "displacement" or "tensor", got {estimator!r}')
        if optimizer_state not in ("keep", "restore"):
            raise ValueError(f'optimizer_state must be "keep" or "restore", got {optimizer_state!r}')
        self.update = jax.jit(lambda g, s, p: tx.update(g, s, p))
        self.tx, self.horizon, self.alpha, self.estimator = tx, horizon, alpha, estimator
        self.optimizer_state, self.max_grad_norm, self.gate = optimizer_state, max_grad_norm, gate

    def init(self, params: Tree) -> State:
        """The state of a run from `params`: any pytree of real floating-point arrays, of any shapes."""
        return State(self.tx.init(params), GateState())

    def step(
        self, params: Tree, state: State, value_and_grad: ValueAndGrad, supplied: float | None = None
    ) -> tuple[Tree, State, Report]:
        """One outer step: (parameters, state, report). Parameters keep their structure, shapes and dtypes.

        `value_and_grad` takes such a pytree and gives a scalar loss and a pytree of gradients like it. What it raises
        comes out, and `params` and `state` are still what they were (ATM-01 to ATM-03). `supplied`: what the caller
        measured at `params` (entropy, say), for Gate(statistic="supplied"). Not itself to be jitted: the gate decides
        on the host.
        """
        if self.gate.statistic == "supplied" and (supplied is None or not math.isfinite(supplied)):
            raise ValueError(f"the gate's statistic is supplied: the step needs a finite number, got {supplied!r}")
        theta0, s0 = params, state.optimizer
        first = self.ask(value_and_grad, theta0)
        if not first.finite:
            return self.done(theta0, s0, state, Report("skipped", 1, first.loss))  # NUM-02
        theta1, s1 = self.U(theta0, s0, first)
        if not self.gate.is_open(state.gate) or first.norm == 0:
            return self.done(theta1, s1, state, Report("single", 1, first.loss))  # GAT-08, NUM-01
        second = self.ask(value_and_grad, theta1)
        if not second.finite:  # theta1, s1 are the single-pass step (NUM-03)
            return self.done(theta1, s1, state, Report("rolled back", 2, first.loss))
        theta2, s2 = self.U(theta1, same_schedule(s1, s0), second)
        thetas, given = (theta0, theta1, theta2), (first.given, second.given)
        tilde, q = virtual_point(thetas, given, self.alpha, horizon=self.horizon, estimator=self.estimator)
        last = self.ask(value_and_grad, tilde)
        if not last.finite:
            return self.done(theta1, s1, state, Report("rolled back", 3, first.loss))  # NUM-04
        s = same_schedule(s2, s0) if self.optimizer_state == "keep" else s0  # OPT-04, OPT-05
        end, s_end = self.U(tilde, s, last)  # COR-01
        report = Report("active", 3, first.loss, float(q))
        return self.done(end, s_end, state, report, self.observation(first, last, supplied))

    def ask(self, value_and_grad: ValueAndGrad, point: Tree) -> Pass:
        loss, grads = value_and_grad(point)
        norm = float(norms(grads))  # waits for the device: the gate and the checks need the number here
        given = grads if self.max_grad_norm is None else clipped(grads, norm, self.max_grad_norm)
        return Pass(float(loss), grads, norm, given)

    def U(self, theta: Tree, s: Tree, p: Pass) -> tuple[Tree, Tree]:
        updates, s = self.update(p.given, s, theta)
        return optax.apply_updates(theta, updates), s

    def observation(self, first: Pass, last: Pass, supplied: float | None) -> float | None:
        if self.gate.statistic == "disagreement":
            return 1 - abs(float(cosine(first.grads, last.grads))) if last.norm else 1.0  # GAT-21
        seen = {"corrective_norm": last.norm, "initial_norm": first.norm, "supplied": supplied, "never": None}
        return seen[self.gate.statistic]

    def done(
        self, theta: Tree, s: Tree, state: State, report: Report, h: float | None = None
    ) -> tuple[Tree, State, Report]:
        return theta, State(s, self.gate.after(state.gate, report.outcome == "active", h)), report
