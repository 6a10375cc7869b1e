# gxpo.py 1.0.0, from the gxpo project. MIT licence, copyright (c) 2026 the gxpo authors.
# Follows GXPO conformance spec 1.1; `python gxpo.py` checks a pasted copy in a few seconds.
"""GXPO, Gradient Extrapolation-Based Policy Optimization (arXiv 2605.06755), around any torch optimizer.

One step on one batch, while active; U is the base optimizer, s its state, c the gradient clipping:

    g0 = grad L(theta0)     theta1, s1 = U(theta0, s0, c0 g0)       first fast step
    g1 = grad L(theta1)     theta2, s2 = U(theta1, s1, c1 g1)       second fast step
    r  = (c1 g1) / (c0 g0)                                          how much of the gradient each coordinate kept
    q  = S_K(r) / S_2(r),   S_n(r) = 1 + r + ... + r^(n-1)          K steps, measured in pairs of steps
    thetaK = theta0 + q (theta2 - theta0)                           where K steps would lead
    theta~ = theta0 + alpha (thetaK - theta0)                       go part of the way
    g~ = grad L(theta~)     theta', s' = U(theta~, s2 or s0, c~ g~) correct with the true gradient there

Three gradients in place of K + 1. A gate watches one figure a step (the norm of g~, say); when that leaves
its usual range, every later step is the base optimizer's own: one gradient, nothing else.

    opt = GXPO(torch.optim.AdamW(model.parameters(), lr=1e-6), horizon=5, alpha=0.5, max_grad_norm=1.0)

    for batch in batches:
        for _ in opt.passes():              # 3 turns while active, 1 after fallback; zeroes, clips and steps by itself
            loss_fn(batch).backward()       # the same batch, rewards, advantages and old log-probabilities each time

`opt.step(closure)` does the same with a closure. `opt.lookahead()` is for trainers that own the last step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import types
import warnings
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch._compile import _disable_dynamo
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    raise ModuleNotFoundError("gxpo.py needs torch: pip install torch", name="torch") from None

__all__ = ["GXPO", "Gate", "GateState", "Report", "extrapolation_scale", "retention_ratio"]
__version__ = "1.0.0"
SPEC_VERSION = "1.1"  # of the conformance suite's SPEC.md; clause numbers in the comments are its own

ESTIMATORS = ("gradient", "displacement", "tensor")
STATE_POLICIES = ("keep", "restore")
STATISTICS = ("corrective_norm", "initial_norm", "disagreement", "supplied", "never")
BASELINES = ("window", "ema")


# ------------------------------------------------------------------------------------------------ the mathematics


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """c = min(1, C / (|g| + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it (CLP-01)."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def retention_ratio(before: Tensor, after: Tensor, rms: Tensor | float) -> Tensor:
    """r = after / before, coordinatewise, clamped to [-2, 3].

    A coordinate takes part only where |before| > 1e-3 `rms`, the root mean square of the whole tensor (EST-02), and
    where the ratio is finite (EST-04). Elsewhere r is 0, for which q is exactly 1: not extrapolated.
    """
    takes_part = before.abs().gt_(1e-3 * rms)  # 1.0 or 0.0: in place, five times as fast as with a mask
    r = takes_part.mul_(before)
    return torch.div(after, r, out=r).nan_to_num_(0.0, 0.0, 0.0).clamp_(-2.0, 3.0)


def extrapolation_scale(r: Tensor, horizon: int) -> Tensor:
    """q = S_K(r) / S_2(r), clamped to [1, K/2 + 1]: K steps' displacement in units of two steps'.

    1 + r divides S_K for even K, which leaves 1 + r^2 + r^4 + ... + r^(K-2). Odd K goes up to r^(K-3) and adds
    r^(K-1) / (1 + r), with q = 1 at the pole. (1 - r^K) / (1 - r), the textbook form, loses r = 1 (EXT-03).
    """
    r2, one = r * r, r.new_ones(())
    q = r2 + one if horizon > 3 else torch.ones_like(r)
    for _ in range(horizon // 2 - 2):
        torch.addcmul(one, r2, q, out=q)
    if horizon % 2:
        # Minus over -(1 + r), made 0 within 1e-8: minus infinity at the pole, which the clamp makes 1.
        q.addcdiv_(r2.pow_(horizon // 2), torch.hardshrink(-1.0 - r, 1e-8), value=-1.0)
        if horizon > 64:  # 3^80 overflows: inf - inf, for r < -1 alone, where q is negative: 1 after the clamp (EXT-04)
            q.nan_to_num_(nan=1.0)
    return q.clamp_(1.0, horizon / 2 + 1)


# ------------------------------------------------------------------------------------------------------- the gate


def _require(ok: bool, name: str, bound: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def _is_number(value: Any, kind: Any = int | float, least: float = -math.inf, above: float = -math.inf) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf and value > above


@dataclass(frozen=True)
class GateState:
    """All that the gate remembers from step to step; plain scalars, so that a checkpoint can hold it."""

    step: int = 0  # outer steps done
    active_steps: int = 0
    fallback_step: int | None = None  # the last step that closed the gate
    streak: int = 0  # surprising observations in a row
    pinned: tuple[float, float] | None = None  # (mu, sigma) that scored the open streak's first member
    seen: int = 0  # observations so far
    history: tuple[float, ...] = ()  # the latest of them
    mean: float = 1.0  # of the "ema" baseline; it starts from (1, 1)
    variance: float = 1.0
    watched: tuple[str, str] | None = None  # the statistic and the baseline that all this is of


@dataclass(frozen=True)
class Gate:
    """When to fall back to single-pass steps: one observation h a step, scored against the recent past.

    z = (h - mu) / (sigma + 1e-9); the gate closes when z >= threshold, `patience` times in a row. The step that
    closes it stands, the next is the first single pass. Raises ValueError for a value out of bounds.
    """

    statistic: str = "corrective_norm"  # |g~| before clipping; "initial_norm" |g0|; "disagreement" 1 - |cos(g0, g~)|;
    #                                     "supplied" by observe(statistic=...), entropy say; "never"
    baseline: str = "window"  # mu, sigma of the preceding `window` observations, or "ema" with rate `omega`
    window: int = 30
    omega: float = 0.1
    threshold: float = 3.0
    patience: int = 3
    two_sided: bool = False  # score |z|: an unusually low value counts as well
    warmup: int = 0  # steps that observe nothing
    cooldown: int | None = None  # single passes until the gate opens again; None: permanent
    max_active_steps: int | None = None  # after so many active steps, off for good

    def __post_init__(self) -> None:
        _require(self.statistic in STATISTICS, "statistic", f"one of {STATISTICS}", self.statistic)
        _require(self.baseline in BASELINES, "baseline", f"one of {BASELINES}", self.baseline)
        _require(_is_number(self.window, int, least=2), "window", "an int >= 2", self.window)
        _require(_is_number(self.omega, above=0) and self.omega <= 1, "omega", "a number in (0, 1]", self.omega)
        _require(_is_number(self.threshold, above=0), "threshold", "a number > 0", self.threshold)
        _require(_is_number(self.patience, int, least=1), "patience", "an int >= 1", self.patience)
        _require(isinstance(self.two_sided, bool), "two_sided", "True or False", self.two_sided)
        _require(_is_number(self.warmup, int, least=0), "warmup", "an int >= 0", self.warmup)
        for name, value in (("cooldown", self.cooldown), ("max_active_steps", self.max_active_steps)):
            _require(value is None or _is_number(value, int, least=0), name, "None or an int >= 0", value)

    def is_open(self, s: GateState) -> bool:
        """Whether the step that comes next is an active one."""
        if self.max_active_steps is not None and s.active_steps >= self.max_active_steps:
            return False
        return s.fallback_step is None or (self.cooldown is not None and s.step > s.fallback_step + self.cooldown)

    def usual(self, s: GateState) -> tuple[float, float] | None:
        """(mu, sigma) of the past, the new observation never included (GAT-02); None while there is too little."""
        if self.baseline == "ema":  # two unscored: (1, 1) is no knowledge of anybody's norms (GAT-18)
            return None if s.seen < 2 else (s.mean, max(math.sqrt(s.variance), 0.01))
        past = s.history[-self.window :]
        if len(past) < self.window:
            return None
        mu = math.fsum(past) / self.window
        return mu, math.sqrt(math.fsum((h - mu) * (h - mu) for h in past) / self.window)  # ** raises on overflow

    def after(self, s: GateState, active: bool, h: float | None = None) -> tuple[GateState, float | None, int]:
        """The state after one more step, the score z and the streak with it; `h`: its observation, None without one."""
        closes, z, streak, mine = False, None, s.streak, (self.statistic, self.baseline)
        if h is not None and s.step >= self.warmup:
            if s.seen and s.watched not in (None, mine):  # figures of another kind say nothing about these
                warnings.warn(f"the gate now watches {mine}, no longer {s.watched}: it starts anew", stacklevel=2)
                s = GateState(step=s.step, active_steps=s.active_steps, fallback_step=s.fallback_step)
            # An open streak is scored by what scored its first member, or its own values would hide it (GAT-11).
            usual, off = s.pinned or self.usual(s), h - s.mean
            if usual is not None:
                z = (h - usual[0]) / (usual[1] + 1e-9)
            surprising = z is not None and (abs(z) if self.two_sided else z) >= self.threshold
            streak = s.streak + 1 if surprising else 0
            closes = streak >= self.patience
            s = replace(s, streak=0 if closes else streak, pinned=usual if surprising and not closes else None)
            s = replace(s, mean=(1 - self.omega) * s.mean + self.omega * h, seen=s.seen + 1, watched=mine)
            s = replace(s, variance=(1 - self.omega) * s.variance + self.omega * off * off)
            s = replace(s, history=(*s.history, h)[-self.window :])
        active_steps = s.active_steps + active
        closes = closes or (active and active_steps == self.max_active_steps)
        fallback = s.step if closes else s.fallback_step
        return (replace(s, step=s.step + 1, active_steps=active_steps, fallback_step=fallback), z, streak)


# ----------------------------------------------------------------------------------------------------- the optimizer


@dataclass(frozen=True)
class Report:
    """What the last step did. A figure that was not measured is None here and absent from metrics()."""

    step: int  # number of the outer step, from 0
    outcome: str  # "active", "single", "rolled back" (to a single pass) or "skipped" (nothing changed)
    why: str
    passes: int  # gradients taken
    loss: float | None  # at theta0; the mean over ranks
    grad_norms: tuple[float, ...]  # |g0|, |g1|, |g~|, before clipping
    mean_q: float | None  # over all coordinates of tensors with a g0, as the two shares are
    multiplier: float | None  # 1 + 2 alpha mean_q: a plain step at so many times the learning rate moves about as far
    taking_part: float | None  # share of coordinates with a ratio other than 0; the others have q = 1
    at_ceiling: float | None  # share of coordinates whose q is the largest there is, K/2 + 1
    statistic: float | None  # h
    z: float | None
    streak: int  # surprising observations in a row, this one included
    fallback_step: int | None  # the step that closed the gate, while it is closed

    @property
    def active(self) -> bool:
        return self.outcome == "active"

    def metrics(self, prefix: str = "gxpo/") -> dict[str, float]:
        """A flat dict of floats, as loggers take it."""
        values = {k: v for k, v in vars(self).items() if k not in ("step", "outcome", "why", "grad_norms")}
        values |= {name: self.outcome == name.replace("_", " ") for name in ("active", "rolled_back", "skipped")}
        values |= zip(("grad_norm_initial", "grad_norm_second", "grad_norm_corrective"), self.grad_norms, strict=False)
        return {prefix + name: float(value) for name, value in values.items() if value is not None}


class GXPO(torch.optim.Optimizer):
    """GXPO around a built torch optimizer; see the module's docstring for the step.

    base: any torch.optim.Optimizer that steps from .grad without a closure. Its param_groups and state are GXPO's own.
    horizon: K, the number of steps to predict, an int >= 2; 2 is SFPO with two fast steps. (paper: 3, 5, 10)
    alpha: part of the way to thetaK, a number >= 0. (paper: 0.1 to 1, first 0.5)
    estimator: where r comes from. "gradient" (paper); "displacement", what the optimizer did in place of what the
        gradient said; "tensor", the same as one number per tensor, which keeps the update's direction. (ours)
    optimizer_state: "keep", the corrective step goes on from s2, so the state advances three times a step (paper's
        first); "restore", it starts from s0 and the fast steps leave no trace (paper's later).
    max_grad_norm: C, clips each gradient by its global norm; None: no clipping. Never clip in the closure.
    gate: when to fall back to single passes; None: never.
    rollback: keep a copy of the optimizer's state through each active step, so that a failed one leaves no trace.
        False saves that memory with optimizer_state="keep" and gives up just this: parameters still return to theta0.
    replay_rng: give every pass the random numbers of the first, so that dropout masks agree (not under lookahead(),
        where the first pass is the trainer's); the base's own draws go on. torch's global generators are rewound for
        it: a thread that draws from them meanwhile (rollouts) gets the same numbers again, unless replay_rng=False.
    process_group: the ranks that train together; None: all of them. Each rank's gradient has to be that of all (DDP,
        FSDP2, DTensors). The same figures then decide all on every rank. Ranks that train apart need a group each.

    Step hooks on the base see each of the three inner steps, and the ratio is of the gradients as they leave them: one
    that edits gradients belongs on the base. Those on the GXPO run once a step: around all of step(closure), or around
    the last inner step alone in passes() and lookahead().
    Raises ValueError for a value out of bounds, TypeError for a base or parameters that cannot be wrapped.
    """

    base: torch.optim.Optimizer
    gate: Gate
    gate_state: GateState
    report: Report  # of the last step; before the first it is None
    process_group: dist.ProcessGroup | None  # not kept by copies and pickles

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        horizon: int = 5,
        alpha: float = 0.5,
        estimator: str = "gradient",
        optimizer_state: str = "keep",
        max_grad_norm: float | None = None,
        gate: Gate | None = Gate(),
        rollback: bool = True,
        replay_rng: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.horizon, self.alpha, self.estimator, self.optimizer_state = horizon, alpha, estimator, optimizer_state
        self.max_grad_norm, self.rollback, self.replay_rng = max_grad_norm, rollback, replay_rng
        _check_arguments(self, base, gate)
        self.base, self.gate = base, gate or Gate("never")
        self.gate_state, self.report = GateState(), cast("Report", None)
        self.__setstate__({})
        self.process_group = process_group

    def _outer_step(self, owned: bool) -> Generator[bool, None, None]:
        """One outer step, whatever comes of it: active, single, rolled back to a single pass, or skipped. A coroutine:
        `yield True` waits for a gradient where the parameters now are, `yield False` for the word to end."""
        step, active = _Step(self, owned), self.active
        try:
            if owned:
                self._empty_grad(step)
            g = yield from self._gradient(step)  # g0
            if active and g.finite and g.norm > 0:
                step.outcome = "active"
                g = yield from self._active_step(step, g)  # theta0, g0 -> theta~, g~
                if not g.finite:  # NUM-03: a single pass from theta0 and s0
                    step.outcome = "rolled back"
                    self._put_back(step)
                    g = yield from self._gradient(step)
            elif active and g.finite:
                step.why = "zero gradient"  # NUM-01: nothing to extrapolate from, nothing for the gate to see
            if not g.finite:
                step.outcome = "skipped"  # NUM-02
            yield False
            self._last_step(step, g)
        except GeneratorExit:  # dropped, not aborted: whoever has the parameters now keeps them
            raise
        except BaseException:
            self._give_up(step)  # back to theta0 and s0, unless the base has made the last step
            raise

    def _active_step(self, step: _Step, g: _Gradient) -> Generator[bool, None, _Gradient]:
        """THE METHOD, in the module docstring's order. Returns the figures of g~, or of an earlier non-finite one."""
        self._keep(step)  # theta0, s0
        self._fast_step(step, g, self._look_at_first)  # theta1, s1 = U(theta0, s0, c0 g0); g0 is kept
        g = yield from self._gradient(step)  # g1
        if not g.finite:
            return g
        self._fast_step(step, g, self._look_at_second)  # theta2, s2 = U(theta1, s1, c1 g1); r, and q in g0's place
        self._move(step)  # theta~ = theta0 + alpha q (theta2 - theta0)
        if self.optimizer_state == "restore" and step.state is not None:
            step.state.put_back()  # OPT-05: the fast steps leave no trace in it
        return (yield from self._gradient(step))  # g~

    def _fast_step(self, step: _Step, g: _Gradient, look: Callable[[_Step], None]) -> None:
        """One of the two steps that show how the gradient changes. `look` takes down what the estimator reads: the
        gradient that the base is about to use, or where the step has led."""
        self._clip(g)
        if self.estimator == "gradient":
            _step_with_a_look(self.base, lambda: look(step))
        else:
            self.base.step()
            look(step)
        self._empty_grad(step)

    def _gradient(self, step: _Step) -> Generator[bool, None, _Gradient]:
        """Wait for the gradient where the parameters now are; then its figures, the same on every rank."""
        step.groups = self._groups() if step.passes else None  # as the last pass left them: a base may adapt its rate
        yield True
        g, loss = self._read(step)
        if step.outcome != "rolled back":  # there this pass repeats the first
            step.norms.append(g.norm)
            step.loss = step.loss if step.passes else loss
        step.passes += 1
        if not g.finite:
            why = f"non-finite {'loss' if math.isfinite(g.norm) else 'gradient'} in pass {step.passes}"
            step.why = f"{step.why}, then {why}" if step.outcome == "rolled back" else why
        return g

    def _last_step(self, step: _Step, g: _Gradient) -> None:
        """The step that stays: theta', s' = U(theta~, s2 or s0, c~ g~), or the single pass's. The gate observes h."""
        observed = {
            "corrective_norm": g.norm,  # before clipping: after it the norm saturates at C and says nothing (CLP-03)
            "initial_norm": step.norms[0],
            "disagreement": 1 - abs(step.cosine),
            "supplied": self._supplied,
            "never": None,
        }
        h = observed[self.gate.statistic] if step.outcome == "active" else None
        gate_state, z, streak = self.gate.after(self.gate_state, step.outcome == "active", h)
        step.result = self._report(step, gate_state, h, z, streak), gate_state
        if step.owned and g.finite:
            self._clip(g)
        self._mark_as_spent(step)
        # On one line, for what interrupts: a step that the base has made is counted, any other is put back (ATM-03).
        step.done = not g.finite or self.base.step() is None or True
        self.report, self.gate_state = step.result
        self._mark_as_spent(step, exactly=True)

    @_disable_dynamo
    @torch.no_grad()
    def lookahead(self) -> bool:
        """Take in the gradient of the pass just done (in .grad) and do everything but the last optimizer step.

        True: parameters have moved and .grad is empty; run forward and backward again, on the same batch, and call
        this again. False: .grad holds the last gradient, UNCLIPPED; clip it if you like and call step() without a
        closure. If anything fails in between, call abort(). Raises RuntimeError where no parameter has a gradient,
        TypeError for sparse ones; parameters and optimizer state are then as before the step, .grad is empty."""
        if self._stepping and self._ready:
            raise RuntimeError("lookahead() has returned False: call step() now, or abort()")
        if not self._stepping:
            self._begin(self._outer_step(owned=False), owned=False)
        return self._go_on()

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One outer step. `closure` runs forward and backward of the whole batch, all micro-batches, and returns the
        loss; it is called three times while active, once after fallback. Returns the loss at theta0. Without a closure:
        the last optimizer step after a lookahead() that has returned False. Raises TypeError where the closure
        returns None, RuntimeError for no gradients, an enabled GradScaler or a call inside passes(). These, and what
        the closure raises, leave parameters and optimizer state as they were.
        """
        _refuse_grad_scaler(self)
        if closure is None:
            return self._finish()
        first = None
        with contextlib.closing(self._passes(self._finish)) as passes:
            for n in passes:
                with torch.enable_grad():
                    loss = closure()
                if loss is None:
                    raise TypeError("the closure must return the loss, got None")
                self.observe(loss=loss)
                first = loss if n == 0 else first
        return first

    def passes(self) -> Iterator[int]:
        """One outer step as a loop: `for _ in opt.passes(): loss_fn(batch).backward()`. Yields the pass's number.

        Three turns while active, one after fallback; after a non-finite pass 2 or 3 one more, which ends the step from
        theta0. Leaving it early (break, return, an exception that you catch) puts everything back, and the next step
        raises RuntimeError once, unless abort() was called, so that a forgotten break cannot pass for training."""
        yield from self._passes(self.step)  # through step(): its hooks run and schedulers see that it was called

    def _passes(self, last: Callable[[], Any]) -> Generator[int, None, None]:
        run, more, n = self._outer_step(owned=True), True, 0
        try:
            self._begin(run, owned=True)
            numbers = _RandomNumbers(self._params() if self.replay_rng else None)
            first = own = numbers.now()  # two streams: each pass draws the same, what the base draws itself goes on
            while more:
                yield n
                if self._run is not run or not self._stepping:
                    raise RuntimeError("abort() was called inside the loop: leave it")
                numbers.go_to(own if n > 0 else numbers.now())
                more, n = self.lookahead(), n + 1
                own = numbers.now()
                numbers.go_to(first if more else own)
            last()
        except BaseException as error:
            if self._run is run and self._stepping:
                self.abort()
                self._left = isinstance(error, GeneratorExit) and last != self._finish  # passes(), left by a break
            raise

    @torch.no_grad()
    def abort(self) -> None:
        """Drop the step in progress: parameters and optimizer state are as before it. Harmless where there is none.
        RuntimeError where something could not be put back; the step is over all the same. Under FSDP2 an exception that
        is caught may leave modules gathered, at the point that was dropped: call reshard() on every FSDPModule."""
        run, self._run, self._left = self._run, None, False
        self._forget()
        if run is not None and run.gi_frame is not None:
            with contextlib.suppress(_Aborted):
                run.throw(_Aborted())

    # ================================================================================================================
    # From here on plumbing: you need not read it to know the method. The rest of the class (rows of tensors, figures
    # and ranks, being a torch.optim.Optimizer); then tensors, the snapshot, what users get wrong, the self-check.
    # ================================================================================================================

    _SETTINGS = (
        *("horizon", "alpha", "estimator", "optimizer_state", "max_grad_norm", "gate", "rollback", "replay_rng"),
    )
    _run: Any  # the coroutine of the step in progress, or of the last one
    _ready: bool  # it waits for the word to end
    _left: bool  # a passes() loop was left early
    _begun: int  # steps, which ranks compare
    _tried: bool  # the base has been seen to step from the parameters as they are
    _standing: tuple[float, float]  # the norm before this one, and how often norms stood at a round number
    _loss: Tensor | float | None  # handed in by observe(), of the pass at hand
    _supplied: float | None  # likewise, the gate's statistic
    # An enabled GradScaler announces itself only to optimizers with this flag; step() then refuses it.
    _step_supports_amp_scaling = True

    @property
    def active(self) -> bool:
        """Whether the next step is an active one (three passes) or a single pass."""
        return self.gate.is_open(self.gate_state)

    def observe(self, *, loss: Tensor | float | None = None, statistic: Tensor | float | None = None) -> None:
        """Hand in what gradients do not show. `loss`: of the pass being made; a non-finite one fails the pass.
        `statistic`: for Gate(statistic="supplied"), a finite number measured at theta0; only a step's first counts.
        step(closure) reports the loss by itself. On several ranks both are averaged over them."""
        if loss is not None:
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(loss.shape)}")
            whole: Tensor | float = getattr(loss, "full_tensor", lambda: loss)()  # of a DTensor
            self._loss = whole.detach() if isinstance(whole, Tensor) else float(whole)
        if statistic is not None and self._supplied is None:
            value = float(statistic)
            _require(math.isfinite(value), "statistic", "a finite number", value)
            self._supplied = value

    @property
    def _stepping(self) -> bool:
        return self._run is not None and self._run.gi_frame is not None

    def _begin(self, run: Generator[bool, None, None], owned: bool) -> None:
        """Make `run` the step in progress, as far as its wait for the first gradient."""
        _refuse_to_begin(self, owned)
        self._begun, self._ready, self._run = self._begun + 1, False, run
        with torch.no_grad():
            next(run)

    def _go_on(self) -> bool:
        """On to the next `yield`. Whether it asks for one more gradient."""
        try:
            more = next(self._run, None)
            self._ready = more is False
            torch.clear_autocast_cache()  # or, inside one autocast block, theta0's casts would answer for theta1
            if more is None:
                self._forget()
            return bool(more)
        except BaseException:
            self.abort()
            raise

    @torch.no_grad()
    def _finish(self) -> None:
        """The last optimizer step, once lookahead() has returned False."""
        if self._stepping and self._ready:
            self._go_on()
        elif not self._stepping and _is_a_checkpoint_tool(self):
            self.base.step()  # makes the state that a checkpoint is about to fill
        else:
            raise RuntimeError(
                "step() needs a closure that runs forward and backward and returns the loss; without one it only ends "
                "a lookahead() that has returned False, and passes() calls it by itself"
            )

    def _forget(self) -> None:
        self._loss = self._supplied = None
        torch.clear_autocast_cache()

    def _keep(self, step: _Step) -> None:
        """theta0; s0 where it may be wanted again; g0 as well where the gate compares it with g~."""
        for rows in step.rows:
            rows.theta0 = rows.copy(rows.parts())
            rows.g0 = rows.values(rows.grads()) if self.gate.statistic == "disagreement" else None
        if self.rollback or self.optimizer_state == "restore":
            step.state = _Snapshot(self.base, self._params())
            _refuse_strangers(self.base, step.state.strangers)
        if not self._tried and (step.state or not self.base.state):  # else the trial would leave a trace
            _refuse_own_weights(self, step)
        self._tried = True

    def _look_at_first(self, step: _Step) -> None:
        """Keep g0, or theta1 for the estimators that watch displacements, and the size of g0, or of u0 = theta1 -
        theta0, in each tensor: a coordinate below 1e-3 of it takes no part (EST-02, EST-03)."""
        seen, by_gradient = [rows for rows in step.rows if rows.has_grad()], self.estimator == "gradient"
        known = by_gradient and not _pre_hooks(self.base)  # else hooks may have changed what was read
        for rows in seen:
            rows.kept = rows.values(rows.grads() if by_gradient else rows.parts())
            if known:
                rows.size = clip_coefficient(step.norms[0], self.max_grad_norm) * rows.norm
            elif by_gradient:
                rows.size = rows.norms(g0 for (g0,) in rows.wide(rows.kept))
            else:
                rows.size = rows.norms(theta1 - theta0 for theta0, theta1 in rows.wide(rows.theta0, rows.kept))
        if not known:
            _over_shards(seen, "size", power=2)

    def _look_at_second(self, step: _Step) -> None:
        """q = S_K(r) / S_2(r), in place of what was kept."""
        kept = [rows for rows in step.rows if rows.kept is not None]
        if self.estimator == "tensor":  # EST-12: <u0, u1> / <u0, u0>, by unit vectors because |u0|^2 may underflow
            for rows in kept:
                size = rows.size.view(-1, 1)
                rows.size = _sum(((u0 / size) * (u1 / size)).sum(1) for u0, u1 in self._changes(rows))
            _over_shards(kept, "size")
        for rows in kept:
            figure, sums = rows.size.view(-1, 1), list[Tensor]()
            for (out,), (before, after) in zip(rows.blocks(rows.kept), self._changes(rows), strict=True):
                if self.estimator == "tensor":
                    r = figure.nan_to_num(0.0, 0.0, 0.0).clamp_(-2.0, 3.0).expand_as(before).clone()
                else:
                    r = retention_ratio(before, after, figure / math.sqrt(max(1, rows.numel)))
                q = extrapolation_scale(r, self.horizon)
                out.copy_(q)
                sums += [q.sum(), r.ne_(0.0).sum(), q.ge_(self.horizon / 2 + 1).sum()]
            rows.tally = torch.stack(sums).view(-1, 3).sum(0)
        _over_shards(kept, "tally")

    def _changes(self, rows: _Rows) -> Iterator[tuple[Tensor, ...]]:
        """What r compares, block by block: (g0, g1), or (u0, u1) = (theta1 - theta0, theta2 - theta1)."""
        if self.estimator == "gradient":
            yield from rows.wide(rows.kept, rows.gather(rows.grads()))
        else:
            for theta0, theta1, theta2 in rows.wide(rows.theta0, rows.kept, rows.gather(rows.parts())):
                yield theta1 - theta0, theta2 - theta1

    def _move(self, step: _Step) -> None:
        """theta~ = theta0 + alpha q (theta2 - theta0); q = 1 for a parameter without a g0."""
        tied = {rows: rows.values(rows.parts()) for rows in step.rows if rows.tied}  # before the first of them moves
        for rows in step.rows:
            theta2 = tied[rows] if rows.tied else rows.gather(rows.parts())
            tensors = [t for t in (theta2, rows.theta0, rows.kept) if t is not None]
            for (x,), (end, origin, *q) in zip(rows.blocks(theta2), rows.wide(*tensors), strict=True):
                x.copy_(torch.addcmul(origin, end - origin, *(q or [end.new_ones(())]), value=self.alpha))
            rows.write(theta2)
        step.moved = True

    def _clip(self, g: _Gradient) -> None:
        c = clip_coefficient(g.norm, self.max_grad_norm)
        alike: dict[Any, list[Tensor]] = {}
        for grad in map(_local, self._grads() if c < 1 else ()):
            alike.setdefault((torch.promote_types(grad.dtype, torch.float32), grad.device), []).append(grad)
        for (dtype, device), grads in alike.items():  # by a tensor: a number would be rounded to bfloat16 first
            _torch._foreach_mul_(grads, torch.tensor(c, dtype=dtype, device=device))

    def _mark_as_spent(self, step: _Step, exactly: bool = False) -> None:
        buffers = {id(grad) for _, grad in step.buffers}
        for grad in self._grads() if step.owned else ():
            setattr(grad, _SPENT, _Spent(_state_of(grad) if exactly else None, id(grad) in buffers))

    def _empty_grad(self, step: _Step) -> None:
        """zero_grad(), but for gradients in a buffer that is somebody's: those stay, zeroed."""
        self.base.zero_grad()
        for p, grad in step.buffers:
            p.grad = grad.zero_()

    def _give_up(self, step: _Step) -> None:
        try:
            if not step.done:
                self._put_back(step)
            elif self.gate_state.step == step.number:
                self.report, self.gate_state = step.result
        finally:
            step.rows, step.state = [], None  # or a traceback would keep them

    def _put_back(self, step: _Step) -> None:
        """theta0 and s0, in place; each part on its own, so that one that cannot go back keeps no other from it."""
        parts: list[Callable[[], object]] = [part for rows in step.rows for part in rows.ways_back()]
        if step.state is not None:
            parts.append(functools.partial(step.state.put_back, failed=True))
        parts.append(functools.partial(self._empty_grad, step))
        problems: list[Exception] = []
        for part in parts:
            try:
                part()
            except Exception as error:
                problems.append(error)
        if problems:
            raise RuntimeError(
                "the step could not be undone, so that parameters or the optimizer's state may be those of the middle "
                f"of a step: load a checkpoint. The reason: {problems[0]!r}"
            ) from problems[0]

    def _params(self) -> list[Tensor]:
        """Every parameter once, whichever groups name it."""
        return list({id(p): p for g in self.param_groups for p in g["params"]}.values())

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params() if p.grad is not None]

    def _groups(self) -> list[Any]:
        """Each group's learning rate (None for one on a device, which reading would wait for) and parameters."""
        rates = [g.get("lr") for g in self.param_groups]
        rates = [lr if not isinstance(lr, Tensor) else lr.tolist() if lr.device.type == "cpu" else None for lr in rates]
        return [(lr, [id(p) for p in g["params"]]) for lr, g in zip(rates, self.param_groups, strict=True)]

    # -- figures, the same on every rank

    def _read(self, step: _Step) -> tuple[_Gradient, float | None]:
        """The figures of the gradient in .grad, and the loss. Raises for a pass that cannot be used."""
        problem = None
        try:
            step.groups = step.groups or self._groups()
            _check_pass(self, step)
            step.rows = step.rows or _in_rows([p for p in self._params() if p.requires_grad or p.grad is not None])
        except (RuntimeError, TypeError) as error:
            problem = error
        ranks = self._everyone([problem is not None, self._begun, step.passes])
        if problem is not None:
            raise problem
        _refuse_ranks_apart(self, ranks)
        norm, loss = self._figures(step)
        ranks = self._everyone([norm, step.cosine, loss is not None, loss or 0.0, self._supplied or 0.0])
        norms, cosines, told, losses, supplied = zip(*ranks, strict=True)
        norm = norms[0] if all(map(math.isfinite, norms)) else math.nan
        _refuse_gradients_apart(norms)
        step.cosine = cosines[0]
        loss = sum(losses) / sum(told) if any(told) else None
        self._supplied = None if self._supplied is None else sum(supplied) / len(supplied)
        self._standing = _warn_of_clipping(norm, *self._standing)
        return _Gradient(norm, math.isfinite(norm) and math.isfinite(loss or 0.0)), loss

    def _everyone(self, mine: list[float]) -> list[list[float]]:
        """A row of figures from each of the ranks that train together; without torch.distributed, just this one."""
        ranks = dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1
        if ranks < 2:
            return [mine]
        rows = torch.zeros(ranks, len(mine), dtype=torch.float64, device=self._params()[0].device)
        rows[dist.get_rank(self.process_group)] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(rows, group=self.process_group)
        return cast("list[list[float]]", rows.tolist())  # HOST SYNC, on several ranks only

    def _figures(self, step: _Step) -> tuple[float, float | None]:
        """|g| and the loss; at theta~ also the means of q and cos(g0, g~): the one host sync of a pass."""
        seen = [rows for rows in step.rows if rows.has_grad()]
        for rows in seen:
            rows.norm = rows.norms(g for (g,) in rows.wide(rows.gather(rows.grads())))
        _over_shards(seen, "norm", power=2)
        kept = [rows for rows in step.rows if step.moved and rows.kept is not None]
        pairs = [rows for rows in seen if step.moved and rows.g0 is not None]
        for rows in pairs:
            rows.dot = _sum((a * b).sum(1) for a, b in rows.wide(rows.g0, rows.gather(rows.grads())))
        _over_shards(pairs, "dot")
        figures = [rows.norm for rows in seen] + [rows.dot for rows in pairs] + [rows.tally for rows in kept]
        figures += [self._loss.reshape(1)] if isinstance(self._loss, Tensor) else []
        dtype = functools.reduce(torch.promote_types, {figure.dtype for figure in figures}, torch.float32)
        read = torch.cat([figure.to(figures[0].device, dtype) for figure in figures]).tolist()  # HOST SYNC
        loss, self._loss = read.pop() if isinstance(self._loss, Tensor) else self._loss, None
        norms, dots = sum(len(rows.params) for rows in seen), sum(len(rows.params) for rows in pairs)
        norm, tallies = math.hypot(*read[:norms]), read[norms + dots :]
        coordinates = max(1, sum(len(rows.params) * rows.numel for rows in kept))
        step.means = [math.fsum(tallies[n::3]) / coordinates for n in range(3)] if kept else [None] * 3
        sizes = step.norms[0] * norm if pairs else 0.0
        step.cosine = math.fsum(read[norms : norms + dots]) / sizes if sizes else 0.0
        return norm, loss

    def _report(self, step: _Step, after: GateState, h: float | None, z: float | None, streak: int) -> Report:
        closed_at = self.gate_state.fallback_step
        closed, why = not self.gate.is_open(after), step.why
        if step.outcome == "single" and not why:
            why = "gate closed" if closed_at is None else f"gate closed at step {closed_at}"
        why = "the gate closes" if step.outcome == "active" and closed else why
        q, took_part, at_ceiling = step.means
        moved = (q, None if q is None else 1 + 2 * self.alpha * q, took_part, at_ceiling)
        done = (step.number, step.outcome, why, step.passes, step.loss, tuple(step.norms))
        return Report(*done, *moved, h, z, streak, after.fallback_step if closed else None)

    # -- being a torch.optim.Optimizer

    if not TYPE_CHECKING:  # a checker has them from Optimizer, as attributes; these are the base's own, never copies
        param_groups = property(lambda self: self.base.param_groups, lambda self, v: _set(self, "param_groups", v))
        state = property(lambda self: self.base.state, lambda self, v: _set(self, "state", v))
        defaults = property(lambda self: self.base.defaults, lambda self, v: _set(self, "defaults", v))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(*(() if set_to_none else (False,)))  # some bases' own takes no argument

    def train(self) -> None:
        """For bases with two modes (schedule-free), which trainers switch; nothing for others."""
        getattr(self.base, "train", bool)()

    def eval(self) -> None:
        """As train()."""
        self._require_idle("eval()")
        getattr(self.base, "eval", bool)()

    def state_dict(self) -> dict[str, Any]:
        """The base's, tensors cloned, and "gxpo": plain scalars. Loads into a GXPO or into the base alone. Each group
        has "gxpo", too, because torch.distributed.checkpoint passes on states and groups alone."""
        self._require_idle("state_dict()")
        state = _torch.utils._pytree.tree_map(
            lambda v: _clone(v) if isinstance(v, Tensor) else deepcopy(v), self.base.state_dict()
        )
        gate = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.gate_state).items()}
        state["gxpo"] = {"version": __version__, "gate": gate}
        for group in state["param_groups"]:  # as one string, because checkpoints of another length must fit
            group["gxpo"] = {"json": json.dumps(state["gxpo"])}
        return cast("dict[str, Any]", state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From state_dict(); or from the base optimizer's own: the gate then starts anew; or {"gxpo": ...} alone, where
        the base's has been loaded by other means."""
        self._require_idle("load_state_dict()")
        groups = state_dict.get("param_groups", [])
        saved: dict[str, Any] = next((d["gxpo"] for d in (state_dict, *groups) if "gxpo" in d), {"gate": {}})
        saved = json.loads(saved["json"]) if "json" in saved else saved
        gate: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["gate"].items()}
        gate.pop("reference", None)  # of a rule that gxpo.py once had
        unknown = gate.keys() - GateState.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"gxpo {__version__} cannot read {sorted(unknown)}, saved by {saved.get('version')}")
        gate_state = GateState(**gate)
        if state_dict.keys() != {"gxpo"}:
            groups = [{k: v for k, v in group.items() if k != "gxpo"} for group in groups]
            self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "gxpo"} | {"param_groups": groups})
        self.gate_state = gate_state

    def _require_idle(self, what: str) -> None:
        if self._stepping:
            raise RuntimeError(f"{what} in the middle of a step: finish it, or call abort() to drop it")

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("a copy")
        return {name: self.__dict__[name] for name in (*self._SETTINGS, "base", "gate_state", "report")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Not Optimizer's own, which writes into the base's defaults."""
        self.__dict__.update(state)
        self._run = self._loss = self._supplied = self.process_group = None
        self._ready = self._left = self._tried = False
        self._begun, self._standing = 0, (0.0, 0.0)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            registry = f"_optimizer_{kind}_hooks"  # these run where the work is done, in the base
            setattr(self, registry, getattr(self.base, registry))
        self._patch_step_function()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._SETTINGS)
        return f"GXPO({settings}, base={self.base!r})"


def _set(opt: GXPO, name: str, value: Any) -> None:
    setattr(opt.base, name, value)


class _Step:
    """What one outer step notes down for its report, and keeps for the way back."""

    def __init__(self, opt: GXPO, owned: bool) -> None:
        self.number, self.owned = opt.gate_state.step, owned  # owned: by passes() or step(closure), which also clip the
        # last gradient; lookahead() leaves it to the trainer
        there = [(p, p.grad) for p in opt._params() if p.grad is not None]  # somebody's buffers have to stay:
        known = [(p, g, getattr(g, _SPENT, None)) for p, g in there]
        self.buffers = [(p, g) for p, g, mark in known if g._is_view() or (mark.buffer if mark else owned)]
        self.outcome, self.why, self.passes, self.moved, self.done = "single", "", 0, False, False  # moved to theta~
        self.result: tuple[Report, GateState]
        self.norms: list[float] = []
        self.loss: float | None = None
        self.cosine = 0.0  # of g0 and g~, where the gate watches it
        self.means: list[Any] = [None] * 3  # over coordinates: q, those that take part, those at the ceiling
        self.groups: list[Any] | None = None  # learning rates and parameters, as no pass may change them
        self.rows: list[_Rows] = []  # the parameters; theta0, and g0 or theta1, then q
        self.state: _Snapshot | None = None  # s0


class _Gradient(NamedTuple):
    """The figures of the gradient in .grad."""

    norm: float  # over all parameters, before clipping; NaN where it is not finite on some rank
    finite: bool  # the norm, and the loss where it is known


# ------------------------------------------------------------------------------------------- tensors, in few operations

_torch: Any = torch  # for what it has without announcing it
_flatten: Callable[[list[Tensor]], Tensor] = _torch._utils._flatten_dense_tensors
_unflatten: Callable[[Tensor, list[Tensor]], list[Tensor]] = _torch._utils._unflatten_dense_tensors


def _local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (DTensor, as FSDP2 makes them); of any other, itself."""
    return cast("Any", t).to_local() if hasattr(t, "to_local") else t


def _is_wrapped(t: Any) -> bool:
    """A tensor subclass around other tensors (quantized ones, say)."""
    return type(t) not in (Tensor, torch.nn.Parameter) and hasattr(t, "__tensor_flatten__")


def _leaves(t: Any) -> list[Tensor]:
    """The tensors that a tensor's numbers are in: itself, but for those around others."""
    if not _is_wrapped(t):
        return [t] if isinstance(t, Tensor) else []
    return [leaf for name in t.__tensor_flatten__()[0] for leaf in _leaves(getattr(t, name))]


def _clone(t: Any) -> Any:
    """Of subclasses by their parts, because some have no clone of their own."""
    if not _is_wrapped(t):
        return t.detach().clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t
    names, context = t.__tensor_flatten__()
    parts = {name: _clone(getattr(t, name)) for name in names}
    return type(t).__tensor_unflatten__(parts, context, t.size(), t.stride())


class _Rows:
    """Tensors as the rows of one matrix: small ones of one shape and kind, so that 1,000 of them cost as few operations
    as one; or a single larger one, without a copy. Of sharded tensors, this rank's parts."""

    theta0: Any = None  # a copy: a matrix, or of a single tensor one like it
    kept: Any = None  # a matrix: g0 or theta1, then q
    g0: Any = None
    norm: Tensor  # of each tensor's .grad, shape (tensors,); of the whole tensor where it is sharded
    size: Tensor  # of g0 or u0, likewise; for the estimator "tensor" at last r
    dot: Tensor  # of g0 and g~, likewise
    tally: Tensor  # sums over all coordinates: q, those that take part, those at the ceiling

    def __init__(self, params: list[Tensor], tied: bool) -> None:
        self.params, self.tied, self.groups = params, tied, _shards(params[0])
        self.numel = params[0].numel()  # of one of them, sharded or not

    def parts(self) -> list[Tensor]:
        return [_local(p) for p in self.params]

    def grads(self) -> list[Tensor]:
        """Zeros where there is none: with them r is 0 and q is 1."""
        return [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in self.params]

    def has_grad(self) -> bool:
        return any(p.grad is not None for p in self.params)

    def copy(self, tensors: list[Tensor]) -> Tensor:
        return self.gather(tensors) if len(tensors) > 1 else _clone(tensors[0])

    def values(self, tensors: list[Tensor]) -> Tensor:
        return self.gather(tensors) if len(tensors) > 1 else self.gather(tensors).clone()

    def gather(self, tensors: list[Tensor]) -> Tensor:
        return _flatten(tensors).view(len(tensors), -1) if len(tensors) > 1 else self.matrix(tensors[0].detach())

    def matrix(self, t: Tensor) -> Tensor:
        """A copy, or what gather() gave; of a quantized tensor its values."""
        if len(self.params) == 1:
            t = t.dequantize() if _is_wrapped(t) and type(t).dequantize is not Tensor.dequantize else t
        return t if len(self.params) > 1 else t.reshape(1, -1)

    def write(self, matrix: Tensor) -> None:
        """To the parameters; nothing to do where the matrix is their own memory."""
        parts = self.parts()
        if len(parts) > 1:
            _torch._foreach_copy_(parts, _unflatten(matrix.view(-1), parts))
        elif _is_wrapped(parts[0]) or matrix.data_ptr() != parts[0].data_ptr():
            _write(self.params[0], matrix)

    def ways_back(self) -> list[Callable[[], object]]:
        if self.theta0 is None:
            return []
        copies = [self.theta0] if len(self.params) == 1 else self.theta0
        return [functools.partial(_write, p, t) for p, t in zip(self.params, copies, strict=True)]

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same columns of every matrix, some at a time: temporaries stay small and, on a CPU, in cache."""
        width = max(1, _block_size(self.params[0]) // len(self.params))
        return zip(*(torch.split(self.matrix(t), width, 1) for t in tensors), strict=True)

    def wide(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """In at least float32, in which ratios, norms and moves are computed."""
        for block in self.blocks(*tensors):
            yield tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in block)

    def norms(self, blocks: Iterable[Tensor]) -> Tensor:
        """Of each row. Block by block, because one float32 sum over 7e7 numbers is 0.4 % off on a CPU."""
        norms = [torch.linalg.vector_norm(block, dim=1) for block in blocks]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return whole


def _write(p: Tensor, value: Tensor) -> None:
    part = _local(p).detach()
    part.copy_(value if _is_wrapped(value) else value.view(part.shape))


def _sum(blocks: Iterable[Tensor]) -> Tensor:
    whole: Tensor = functools.reduce(torch.add, blocks)
    return whole


def _block_size(p: Tensor) -> int:
    return 2**18 if p.device.type == "cpu" else 2**24


def _in_rows(params: list[Tensor]) -> list[_Rows]:
    """In rows of like tensors; those that share memory (tied through .data) each alone."""
    spans, tied, end, last = [], set(), 0, -1
    for n, p in enumerate(params):
        for t in _leaves(_local(p)):
            extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
            spans += [(t.data_ptr(), t.data_ptr() + extent * t.element_size(), n)] if t.numel() else []
    for start, stop, n in sorted(spans):
        tied |= {last, n} if start < end else set()
        end, last = max((end, last), (stop, n))
    alike: dict[Any, list[Tensor]] = {}
    for n, p in enumerate(params):
        alone = n in tied or 8 * p.numel() > _block_size(p) or _is_wrapped(_local(p))
        layout = None if type(p) is torch.nn.Parameter else (getattr(p, "placements", 0), getattr(p, "device_mesh", 0))
        key = (n if alone else -1, p.shape, p.dtype, p.device, p.grad is None or p.grad.dtype, layout)
        alike.setdefault(key, []).append(p)
    rows = []
    for (n, *_), same in alike.items():
        most = max(1, _block_size(same[0]) // max(1, same[0].numel()))
        rows += [_Rows(same[at : at + most], n in tied) for at in range(0, len(same), most)]
    return rows


def _shards(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of ranks whose parts of p make up the whole. Replicas are in none: they would count twice."""
    split = [n for n, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
    mesh: Any = getattr(p, "device_mesh", None)
    return tuple(mesh.get_group(n) for n in split if mesh.size(n) > 1)


def _over_shards(all_rows: list[_Rows], name: str, power: int = 1) -> None:
    """Make a figure of this rank's parts that of the whole tensors: their sum, or with power=2 the root of the sum of
    their squares. One all_reduce for each mesh that shards; none where nothing is sharded."""
    for groups in dict.fromkeys(rows.groups for rows in all_rows if rows.groups):
        same = [rows for rows in all_rows if rows.groups == groups]
        parts: list[Tensor] = [getattr(rows, name) for rows in same]
        whole = torch.cat(parts).double() ** power
        for group in groups:
            dist.all_reduce(whole, group=group)
        for rows, part in zip(same, parts, strict=True):
            value, whole = whole[: len(part)], whole[len(part) :]
            setattr(rows, name, (value ** (1 / power)).to(part.dtype))


# ----------------------------------------------------------------------- what the base optimizer writes, sees and draws


class _Snapshot:
    """All that base.step() may write besides the parameters: what hangs on the base, wherever. put_back() writes old
    contents into the same tensors, dicts, lists and objects, because others may hold them; never through
    load_state_dict, which may cast (ATM-02)."""

    VALUES = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
    THEMSELVES = (type, torch.nn.Module, types.FunctionType, types.ModuleType)  # not copied, as parameters
    FOREIGN = ("torch.distributed.", "torch.cuda.", "torch._", "threading.", "_thread.", "logging.")

    def __init__(self, base: torch.optim.Optimizer, params: list[Tensor]) -> None:
        self.containers: list[tuple[Any, Any]] = []  # (a dict, list, set or deque, a shallow copy)
        self.slots: list[tuple[Any, str, Any]] = []
        self.generators: list[tuple[Callable[[Any], object], Any]] = []  # of random numbers
        self.opaque: dict[int, Any] = {}  # copies of what cannot be written into
        self.tensors: list[tuple[list[Tensor], list[torch.Size], Tensor]] = []  # those that are copied together
        self.params = {id(p): p for p in params}
        self.strangers: list[Tensor] = []  # with gradients, in inner optimizers' groups alone
        held = [leaf for p in params for t in (p, p.grad) if t is not None for leaf in _leaves(_local(t))]
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held]
        self.starts, self.ends = [list(ends) for ends in zip(*sorted(spans), strict=True)] if spans else ([], [])
        seen: dict[int, Any] = dict(self.params)
        todo: list[Any] = [base]
        alike: dict[Any, list[Tensor]] = {}
        while todo:
            x = todo.pop()
            if type(x) in self.VALUES or id(x) in seen:
                continue
            seen[id(x)] = x
            if not isinstance(x, Tensor) or type(x) not in (Tensor, torch.nn.Parameter):
                todo += self._inside(x)
            for t in _leaves(x):
                # But for parts of parameters, and for what is expanded, which nobody can write into.
                if t.layout != torch.strided:
                    self.opaque[id(x)] = x.clone()
                elif not self._is_known(t.data_ptr()) and (t.is_contiguous() or all(t.stride())):
                    small = t.numel() <= 2**14 and t.element_size() > 1
                    alike.setdefault((t.dtype, t.device) if small else id(t), []).append(t)
        for same in alike.values():
            whole = _clone(same[0]) if len(same) == 1 else _flatten(same)
            self.tensors.append((same, [t.shape for t in same], whole))

    def _is_known(self, address: int) -> bool:
        """In the memory of a parameter or of a gradient."""
        at = bisect_right(self.starts, address) - 1
        return at >= 0 and address < self.ends[at]

    def _inside(self, x: Any) -> list[Any]:
        """Note what x holds, and return it."""
        kind, inside = type(x), list[Any]()
        if isinstance(x, dict):
            self.containers.append((x, dict.copy(x)))
            inside = list(dict.values(x))
        elif isinstance(x, list | set | deque):
            self.containers.append((x, list(x)))
            inside = list(x)
        elif isinstance(x, tuple | frozenset):
            inside = list(x)
        elif isinstance(x, types.MappingProxyType):
            inside = list(x.values())
        elif isinstance(x, functools.partial):
            inside = [x.func, x.args, x.keywords]
        elif isinstance(x, types.MethodType | types.BuiltinFunctionType):
            return [x.__self__]
        elif hasattr(kind, "get_state") and hasattr(kind, "set_state"):  # torch's and numpy's old generators
            self.generators.append((x.set_state, x.get_state()))
            return []
        elif hasattr(kind, "getstate") and hasattr(kind, "setstate"):  # Python's random.Random
            with contextlib.suppress(NotImplementedError):  # the system's has no state
                self.generators.append((x.setstate, x.getstate()))
            return []
        elif hasattr(kind, "bit_generator") or hasattr(kind, "random_raw"):  # numpy's
            bits = getattr(x, "bit_generator", x)
            self.generators.append((functools.partial(setattr, bits, "state"), bits.state))
            return []
        elif isinstance(x, (*self.THEMSELVES, GXPO)) or (
            not isinstance(x, torch.optim.Optimizer) and f"{kind.__module__}.".startswith(self.FOREIGN)
        ):
            return []
        elif hasattr(kind, "__array_interface__"):  # numpy's
            address, read_only = cast("Any", x).__array_interface__["data"]
            if hasattr(kind, "__setitem__") and not read_only and not self._is_known(address):
                self.containers.append((x, deepcopy(x)))
        elif not hasattr(x, "__dict__") and not hasattr(kind, "__slots__") and not isinstance(x, Tensor):
            with contextlib.suppress(Exception):  # itertools' counters; what cannot be copied cannot be kept
                self.opaque[id(x)] = deepcopy(x, dict(self.params))
        for owner in kind.__mro__:
            names = vars(owner).get("__slots__", ())
            for name in [names] if isinstance(names, str) else names:
                name = f"_{owner.__name__.lstrip('_')}{name}" if name[:2] == "__" and name[-2:] != "__" else name
                if name[:2] != "__":
                    self.slots.append((x, name, getattr(x, name, _Aborted)))
                    inside.append(getattr(x, name, None))
        if isinstance(x, torch.optim.Optimizer):
            inner = [p for group in getattr(x, "param_groups", []) for p in group["params"]]
            self.strangers += [p for p in inner if id(p) not in self.params and p.grad is not None]
        if isinstance(attributes := getattr(x, "__dict__", None), dict):
            self.containers.append((attributes, attributes.copy()))
            hooks = "_hooks" if isinstance(x, torch.optim.Optimizer) else "\0"
            inside += [value for name, value in attributes.items() if not str(name).endswith(hooks)]
        return inside

    def put_back(self, failed: bool = False) -> None:
        """`failed`: the generators of random numbers as well, which under "restore" go on."""
        fresh: dict[int, Any] = {}
        for x, old in self.containers:
            if isinstance(x, dict):
                plain: Any = OrderedDict if isinstance(x, OrderedDict) else dict  # not what a subclass made of it
                same_keys = len(x) == len(old) and all(a is b or a == b for a, b in zip(x, old, strict=True))
                if not same_keys:  # in the same order, too
                    plain.clear(x)
                for name, value in old.items():
                    plain.__setitem__(x, name, self._fresh(value, fresh))
            elif isinstance(x, (list, set, deque)):
                kind: Any = next(k for k in (list, set, deque) if isinstance(x, k))  # not what a subclass made of it
                kind.clear(x)
                getattr(kind, "update" if kind is set else "extend")(x, [self._fresh(value, fresh) for value in old])
            else:
                x[...] = old
        for x, name, value in self.slots:
            if value is not _Aborted:
                object.__setattr__(x, name, self._fresh(value, fresh))
            elif hasattr(x, name):
                object.__delattr__(x, name)
        for same, shapes, whole in self.tensors:
            copies = [whole] if len(same) == 1 else torch.split(whole, [math.prod(shape) for shape in shapes])
            for t, saved, shape in zip(same, copies, shapes, strict=True):
                t.copy_(saved.view(shape)) if t.shape == shape else setattr(t, "data", saved.view(shape).clone())
        for restore, state in self.generators if failed else ():
            restore(state)

    def _fresh(self, x: Any, made: dict[int, Any]) -> Any:
        """x; of what cannot be written into a new copy, one for all its holders. A tuple of such is made anew."""
        if id(x) in self.opaque:
            made.setdefault(id(x), deepcopy(self.opaque[id(x)], dict(self.params)))
            return made[id(x)]
        items = tuple(self._fresh(item, made) for item in x) if self.opaque and type(x) is tuple else ()
        return items if any(a is not b for a, b in zip(items, x if items else (), strict=True)) else x


def _pre_hooks(base: torch.optim.Optimizer) -> bool:
    from torch.optim.optimizer import _global_optimizer_pre_hooks  # torch.optim hides its module

    return bool(_global_optimizer_pre_hooks or base._optimizer_step_pre_hooks)


def _step_with_a_look(base: torch.optim.Optimizer, look: Callable[[], None]) -> None:
    """base.step(); `look` sees the gradients as the base's own hooks leave them."""
    looks, handle = [look], None
    if _pre_hooks(base):
        handle = base.register_step_pre_hook(lambda *_: looks.pop()() if looks else None)
    else:
        looks.pop()()
    try:
        base.step()
    finally:
        if handle is not None:
            handle.remove()
    if looks:  # its step runs no hooks
        look()


class _RandomNumbers:
    """torch's generators of random numbers: the CPU's and those of the parameters' devices. None without parameters."""

    def __init__(self, params: list[Tensor] | None, required: bool = True) -> None:
        self.functions: list[Any] = [] if params is None else [(torch.get_rng_state, torch.set_rng_state)]
        for device in {p.device for p in params or () if p.device.type != "cpu"}:
            module: Any = getattr(torch, device.type, None)
            if hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state"):
                at = {} if device.type == "mps" else {"device": device}
                functions = (module.get_rng_state, module.set_rng_state)
                self.functions.append([functools.partial(function, **at) for function in functions])
            elif required:
                raise RuntimeError(f"torch cannot rewind the random numbers of {device}: set replay_rng=False")

    def now(self) -> list[Tensor]:
        return [get() for get, _ in self.functions]

    def go_to(self, states: list[Tensor]) -> None:
        for (_, put), state in zip(self.functions, states, strict=True):
            put(state)


# ------------------------------------------------------------------------------------------------ what users get wrong

_SPENT = "_spent_by_gxpo"


class _Aborted(BaseException):
    """What abort() ends a step with."""


def _check_arguments(opt: GXPO, base: torch.optim.Optimizer, gate: Gate | None) -> None:
    kind, package = type(base), type(base).__module__.split(".")[0]
    if package == "deepspeed" or kind.__name__ == "ZeroRedundancyOptimizer":
        raise TypeError(f"{kind} keeps its state on other ranks and steps by itself: use FSDP2 or DDP")
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, GXPO | torch.optim.LBFGS):
        raise TypeError(f"base must be a torch.optim.Optimizer that steps without a closure, got {kind}")
    if package == "accelerate":
        raise TypeError(f"{kind} only wraps an optimizer: give that one to GXPO, and GXPO to prepare()")
    if not hasattr(base, "_optimizer_state_dict_pre_hooks"):  # Optimizer.__init__ has not run
        raise TypeError(
            f"{kind} is built around another optimizer and is not a whole one itself: put GXPO around the inner "
            f"optimizer and {kind.__name__}, if it takes that, around the GXPO"
        )
    for why in filter(None, (_unfit(p) for group in base.param_groups for p in group["params"])):
        raise TypeError(why)
    _require(_is_number(opt.horizon, int, least=2), "horizon", "an int >= 2", opt.horizon)
    _require(_is_number(opt.alpha, least=0), "alpha", "a number >= 0", opt.alpha)
    _require(opt.estimator in ESTIMATORS, "estimator", f"one of {ESTIMATORS}", opt.estimator)
    _require(opt.optimizer_state in STATE_POLICIES, "optimizer_state", f"one of {STATE_POLICIES}", opt.optimizer_state)
    clip_ok = opt.max_grad_norm is None or _is_number(opt.max_grad_norm, above=0)
    _require(clip_ok, "max_grad_norm", "None or a number > 0", opt.max_grad_norm)
    _require(gate is None or isinstance(gate, Gate), "gate", "None (never) or a Gate", gate)
    for name, value in (("rollback", opt.rollback), ("replay_rng", opt.replay_rng)):
        _require(isinstance(value, bool), name, "True or False", value)


def _unfit(p: Tensor) -> str | None:
    """Why GXPO cannot move p; None where it can."""
    if p.is_complex():
        return f"GXPO takes real parameters only, got {p.dtype}: use torch.view_as_real"
    if getattr(p, "_fsdp_flattened", False):
        return (
            "these parameters belong to FSDP1 (FullyShardedDataParallel), whose flat shards hide which numbers make up "
            "a tensor: use fully_shard (FSDP2), whose parameters are DTensors"
        )
    if hasattr(p, "ds_id"):
        return "these parameters belong to DeepSpeed's engine, which gathers and steps them by itself: use FSDP2 or DDP"
    if not p.is_floating_point() or (_is_wrapped(_local(p)) and type(_local(p)).dequantize is Tensor.dequantize):
        return f"GXPO has to compute with parameters of type {type(_local(p))}, which have no dequantize() of their own"
    return None


def _refuse_to_begin(opt: GXPO, owned: bool) -> None:
    if "base" not in opt.__dict__:
        raise RuntimeError(
            "this wrapper only looks like a GXPO (Lightning's self.optimizers()): call passes() and lookahead() on the "
            "GXPO itself, self.optimizers().optimizer"
        )
    if opt._left:
        opt._left = False
        raise RuntimeError(
            "the last passes() loop was left before its end, and everything was put back: let it run out (no break or "
            "return in it); if it was meant, or you caught an exception, call abort() first"
        )
    opt._require_idle("another step")
    for grad in opt._grads() if owned else ():
        # Zeros made beforehand are none. Of a sharded gradient a rank sees its part alone: any that is new is refused.
        new_shard = hasattr(grad, "to_local") and not hasattr(grad, _SPENT)
        if not _is_spent(grad) and (new_shard or grad.layout != torch.strided or _local(grad).count_nonzero()):
            raise RuntimeError(
                "there are gradients that no pass has made, and this step would lose them: every micro-batch belongs "
                "into every pass (with Lightning, accumulate_grad_batches=1). If they are old ones, zero_grad() first"
            )


class _Spent:
    """The mark of a gradient that a step has used up: its state then (None: any), and whether the buffer is somebody's.
    A copy of the gradient, by deepcopy or pickle, begins as used up, too."""

    def __init__(self, state: tuple[int, int] | None, buffer: bool) -> None:
        self.state, self.buffer = state, buffer

    def __reduce__(self) -> Any:
        return _Spent, ((-1, 0), self.buffer)


def _state_of(grad: Tensor) -> tuple[int, int]:
    return _local(grad)._version, _local(grad).data_ptr()


def _is_spent(grad: Tensor) -> bool:
    mark = getattr(grad, _SPENT, None)
    if mark is not None and mark.state == (-1, 0):  # a copy, which torch makes with one write or none
        return _local(grad)._version <= 1
    return mark is not None and mark.state in (None, _state_of(grad))


def _check_pass(opt: GXPO, step: _Step) -> None:
    if step.groups != opt._groups():
        raise RuntimeError(
            "a learning rate or the set of parameters changed between the passes of one step: call schedulers, "
            "add_param_group() and the like after the step, not in the closure"
        )
    if opt.active and not step.passes and opt.gate.statistic == "supplied" and opt._supplied is None:
        raise RuntimeError("the gate's statistic is supplied: call observe(statistic=...) in the first pass")
    params = opt._params()
    if not any(p.grad is not None for p in params):
        hooks = ("_post_accumulate_grad_hooks", "_backward_hooks", "_in_backward_optimizers")
        if any(getattr(p, name, None) for p in params for name in hooks):
            raise RuntimeError(
                "no parameter has a gradient after backward(), and parameters have hooks: an optimizer that steps "
                "during backward and frees the gradients leaves none for GXPO. Switch it off"
            )
        raise RuntimeError("no parameter has a gradient: was backward() called, on a loss that depends on them?")
    for p, grad in ((p, p.grad) for p in params if p.grad is not None):
        part = _local(grad)
        if part.layout != torch.strided or part.is_complex():
            kind = f"{part.layout} {part.dtype}"
            raise TypeError(f"GXPO takes dense real gradients only, got {kind} for a parameter of {tuple(p.shape)}")
        layouts = [getattr(t, "placements", None) for t in (p, grad)]
        if layouts[0] != layouts[1]:
            raise TypeError(f"a gradient must be sharded as its parameter is, got {layouts[1]} for {layouts[0]}")
        if why := _unfit(p):
            raise TypeError(why)


def _refuse_ranks_apart(opt: GXPO, ranks: list[list[float]]) -> None:
    for rank, (failed, *_) in enumerate(ranks):
        if failed:
            raise RuntimeError(f"rank {rank} cannot use its gradient, as its own error says: no rank makes this step")
    if any(row != ranks[0] for row in ranks):
        opt._begun = max(int(begun) for _, begun, _ in ranks)
        raise RuntimeError(
            "the ranks are not in the same pass of the same step: an exception was caught on one of them, say. All are "
            "back where their steps began; let an exception end the step on every rank"
        )


def _refuse_gradients_apart(norms: tuple[float, ...]) -> None:
    if all(map(math.isfinite, norms)) and max(norms) > 1.001 * min(norms):
        raise RuntimeError(
            f"the norm of the gradient differs between ranks, {min(norms):g} to {max(norms):g}: it has to be the "
            "gradient of all ranks' data (DDP, FSDP2; no no_sync() around the last micro-batch; not a pipeline's "
            "stages), of tensors that are whole or DTensors. Ranks that train apart need a process_group each"
        )


def _refuse_grad_scaler(opt: GXPO) -> None:
    if hasattr(opt, "found_inf"):
        for mark in ("found_inf", "grad_scale"):
            delattr(opt, mark)
        raise RuntimeError(
            "GXPO cannot run under an enabled GradScaler, which would hide skipped inner steps: use bfloat16, or "
            "GradScaler(enabled=False)"
        )


def _refuse_strangers(base: torch.optim.Optimizer, strangers: list[Tensor]) -> None:
    if strangers:
        raise RuntimeError(
            f"{type(base)} has inner optimizers with {len(strangers)} parameters that are not in its own param_groups, "
            "and GXPO could not move those: put all parameters into the groups, or a GXPO around each of the optimizers"
        )


def _refuse_own_weights(opt: GXPO, step: _Step) -> None:
    """A base that writes the parameters from a copy of its own would overwrite theta~, and nobody would notice. What it
    does tells: push some coordinates, let it step, and see whether the push is still there. Then all is put back."""
    params = opt._params()
    state, numbers = step.state or _Snapshot(opt.base, params), _RandomNumbers(params, required=False)
    drawn, grads = numbers.now(), [(p, p.grad, None if p.grad is None else _clone(p.grad)) for p in params]
    try:
        lost = _pushes_are_lost(opt.base, [rows for rows in step.rows if rows.gather(rows.parts()).numel()], grads)
    except Exception:  # a base that takes no gradient twice, say: its own steps will tell
        lost = False
    for back in [back for rows in step.rows for back in rows.ways_back()]:
        back()
    state.put_back(failed=True)
    numbers.go_to(drawn)
    for p, grad, old in grads:
        p.grad = grad if grad is None or old is None else grad.copy_(old)
    grads.clear()  # or a traceback would keep them, and this:
    del state
    if any(row[0] for row in opt._everyone([lost])):
        raise RuntimeError(
            f"{type(opt.base)} keeps a copy of its own of the weights (float32 masters, say, or dual averaging) and "
            "writes the parameters from it, so that the move to theta~ would be overwritten: use an optimizer that "
            "steps from the parameters as they are. Nothing was changed"
        )


def _pushes_are_lost(base: torch.optim.Optimizer, all_rows: list[_Rows], grads: list[Any]) -> bool:
    """Whether some tensor twice shows nothing of a push; once it may, by an average in its first step or a bound."""

    def step_without_hooks() -> None:
        unhooked = functools.partial(getattr(type(base).step, "__wrapped__", type(base).step), base)
        vars(base).get("step", unhooked)()
        for p, grad, old in grads:
            p.grad = grad if grad is None else grad.copy_(old)

    def values() -> list[Tensor]:
        some = (rows.gather(rows.parts())[:, :64] for rows in all_rows)
        return [t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in some]

    step_without_hooks()  # the first step may project, say
    lost: list[Tensor] = []
    for sign in (1.0, -1.0):
        before = values()
        step_without_hooks()
        here = values()
        moved = [(end - start).abs().amax(1) for start, end in zip(before, here, strict=True)]
        for rows, end, far in zip(all_rows, here, moved, strict=True):
            far = (200 * far).minimum(end.abs().amax(1).maximum(20 * far))  # more than a step, no more than the weights
            signs = torch.arange(end.shape[1], device=end.device) * 0.618034 % 1 < 0.5  # no pattern that updates have
            whole = rows.gather(rows.parts())
            whole[:, :64] += (sign * far.where(far > 0, 1.0).view(-1, 1) * (2.0 * signs - 1.0)).to(whole.dtype)
            rows.write(whole)
        pushes = [t - end for t, end in zip(values(), here, strict=True)]  # as they came to be
        step_without_hooks()
        left = [((t - end) * push).sum(1) for t, end, push in zip(values(), here, pushes, strict=True)]
        sizes = [(push * push).sum(1) for push in pushes]
        seen = [(size > 0) & (far > 0) for size, far in zip(sizes, moved, strict=True)]
        if not any(bool(some.any()) for some in seen):  # at a rate of 0 nothing moves
            seen = [size > 0 for size in sizes]
        gone = [some & (share < 0.03 * size) for some, share, size in zip(seen, left, sizes, strict=True)]
        lost = [a & b for a, b in zip(lost, gone, strict=True)] if lost else gone
    return any(bool(some.any()) for some in lost)


def _is_a_checkpoint_tool(opt: GXPO) -> bool:
    """torch.distributed.checkpoint makes an optimizer's state by a step at a rate of 0 with gradients of 0."""
    idle = all(float(group.get("lr", 0)) == 0 for group in opt.param_groups)
    return not opt.state and idle and bool(opt._grads()) and not any(_local(g).count_nonzero() for g in opt._grads())


def _warn_of_clipping(norm: float, before: float, times: float) -> tuple[float, float]:
    """Says once that gradients come clipped already: nine norms in a row, not the very same, that differ by rounding
    from a round number. Returns the norm, and how often norms stood there."""
    at = float(f"{norm:.2g}")
    near = at > 0 and max(abs(norm - at), abs(before - at)) <= 1e-5 * at
    times = times + (norm != before) if near else min(times, 0)
    if times == 8:
        times = -math.inf
        warnings.warn(
            f"the norm of the gradient stays at {at:g}: is it clipped in the closure, or before lookahead()? The gate "
            "and the ratio have to see it as it was: use max_grad_norm",
            stacklevel=2,
        )
    return norm, times


# ------------------------------------------------------------------------------------------------------- self-check


def _self_check() -> None:
    """What someone who pasted this file wants to see."""
    print(f"gxpo.py {__version__}, spec {SPEC_VERSION}, torch {torch.__version__}")
    curvature, results = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64), list[bool]()

    def run(*steps: list[float], **settings: Any) -> tuple[Tensor, Report]:  # a step: what scales the loss of each pass
        theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
        opt = GXPO(torch.optim.SGD([theta], lr=0.5), **settings)
        for scales in steps:
            for n in opt.passes():
                torch.autograd.backward(scales[n] * 0.5 * (curvature * theta * theta).sum())
        return theta.detach(), opt.report

    def check(what: str, ok: bool, saw: object) -> None:
        results.append(ok)
        print(f"{'ok  ' if ok else 'FAIL'}  {what}: {saw}")

    theta, report = run([1.0] * 3, alpha=1.0)
    error = (theta - (1 - 0.5 * curvature) ** 6).abs().max().item()
    check("on a diagonal quadratic, alpha = 1, one step is K + 1 = 6 plain ones", error < 1e-14, f"error {error:.0e}")
    check("an active step takes three gradients", report.passes == 3, report.passes)
    _, report = run(*[[1.0] * 3] * 4, [40.0] * 3, [1.0], gate=Gate(window=4, patience=1))
    check("a spike of |g~| in step 4 closes the gate", report.fallback_step == 4, report.why)
    check("after it a step takes one gradient", report.passes == 1, report.passes)
    theta, report = run([1.0, math.nan, 1.0])
    exact = torch.equal(theta, 1 - 0.5 * curvature)
    check("NaN in pass 2: back to theta0, one plain step", exact, f"{report.outcome}, {report.why}")
    if not all(results):
        raise SystemExit(f"{results.count(False)} of {len(results)} checks failed: this copy is not in order")
    print(f"{len(results)} of {len(results)} checks passed")


if __name__ == "__main__":
    _self_check()
