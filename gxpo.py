# gxpo.py 1.0.0, from the gxpo project. MIT licence, copyright (c) 2026 the gxpo authors.
# Follows GXPO conformance spec 1.0; `python gxpo.py` checks a pasted copy in a few seconds.
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
import dataclasses
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    raise ModuleNotFoundError("gxpo.py needs torch: pip install torch", name="torch") from None

__all__ = ["GXPO", "Gate", "GateState", "Report", "extrapolation_scale", "retention_ratio"]
__version__ = "1.0.0"
SPEC_VERSION = "1.0"  # of the conformance suite's SPEC.md; clause numbers in the comments are its own

ESTIMATORS = ("gradient", "displacement", "tensor")
STATE_POLICIES = ("keep", "restore")
STATISTICS = ("corrective_norm", "initial_norm", "disagreement", "supplied", "never")
BASELINES = ("window", "ema")
_SPENT = "_spent_by_gxpo"  # mark of a gradient that a step has used up


# ------------------------------------------------------------------------------------------------ the mathematics


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """c = min(1, C / (|g| + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it (CLP-01)."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def retention_ratio(before: Tensor, after: Tensor, rms: float) -> Tensor:
    """r = after / before, coordinatewise, clamped to [-2, 3].

    A coordinate takes part only where |before| > 1e-3 `rms`, the root mean square of the whole tensor (EST-02), and
    where the ratio is finite (EST-04). Elsewhere r is 0, for which q is exactly 1: not extrapolated.
    """
    # hardshrink: 0 where a coordinate takes no part, so that its ratio is not finite. A mask is five times as slow.
    r = torch.hardshrink(before, 1e-3 * rms)
    return torch.div(after, r, out=r).nan_to_num_(0.0, 0.0, 0.0).clamp_(-2.0, 3.0)


def extrapolation_scale(r: Tensor, horizon: int) -> Tensor:
    """q = S_K(r) / S_2(r), clamped to [1, K/2 + 1]: K steps' displacement in units of two steps'.

    1 + r divides S_K for even K, which leaves 1 + r^2 + r^4 + ... + r^(K-2). Odd K goes up to r^(K-3) and adds
    r^(K-1) / (1 + r), with q = 1 at the pole. (1 - r^K) / (1 - r), the textbook form, loses r = 1 (EXT-03).
    """
    r2, q, one = r * r, torch.ones_like(r), r.new_ones(())
    for _ in range(horizon // 2 - 1):
        torch.addcmul(one, r2, q, out=q)
    if horizon % 2:
        # Minus over -(1 + r), made 0 within 1e-8: minus infinity at the pole, which the clamp makes 1.
        q.addcdiv_(r2.pow_(horizon // 2), torch.hardshrink(-1.0 - r, 1e-8), value=-1.0)
        q.nan_to_num_(nan=1.0)  # inf - inf, for r < -1 alone, where q is negative: 1 after the clamp, too (EXT-04)
    return q.clamp_(1.0, horizon / 2 + 1)


# ------------------------------------------------------------------------------------------------------- the gate


def _require(ok: bool, name: str, bound: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object, above: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf


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
    reference: float | None = None  # of the level rule: mean of the first full window


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
    level: float | None = None  # also close when the last 10 have a median above level x the first window's mean

    def __post_init__(self) -> None:
        _require(self.statistic in STATISTICS, "statistic", f"one of {STATISTICS}", self.statistic)
        _require(self.baseline in BASELINES, "baseline", f"one of {BASELINES}", self.baseline)
        _require(_is_int(self.window, 2), "window", "an int >= 2", self.window)
        _require(_is_number(self.omega, above=0) and self.omega <= 1, "omega", "a number in (0, 1]", self.omega)
        _require(_is_number(self.threshold, above=0), "threshold", "a number > 0", self.threshold)
        _require(_is_int(self.patience, 1), "patience", "an int >= 1", self.patience)
        _require(isinstance(self.two_sided, bool), "two_sided", "True or False", self.two_sided)
        _require(_is_int(self.warmup, 0), "warmup", "an int >= 0", self.warmup)
        for name in ("cooldown", "max_active_steps"):
            value = getattr(self, name)
            _require(value is None or _is_int(value, 0), name, "None or an int >= 0", value)
        _require(self.level is None or _is_number(self.level, above=0), "level", "None or a number > 0", self.level)

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
        closes, z, streak = False, None, s.streak
        if h is not None and s.step >= self.warmup:
            # An open streak is scored by what scored its first member, or its own values would hide it (GAT-11).
            usual, off = s.pinned or self.usual(s), h - s.mean
            if usual is not None:
                z = (h - usual[0]) / (usual[1] + 1e-9)
            surprising = z is not None and (abs(z) if self.two_sided else z) >= self.threshold
            streak = s.streak + 1 if surprising else 0
            history, reference = (*s.history, h)[-max(self.window, 10) :], s.reference
            closes = streak >= self.patience
            if self.level is not None and reference is not None and len(history) >= 10:
                closes = closes or statistics.median(history[-10:]) > self.level * reference
            if reference is None and len(history) >= self.window:
                reference = math.fsum(history[-self.window :]) / self.window
            s = dataclasses.replace(
                s,
                streak=0 if closes else streak,
                pinned=usual if surprising and not closes else None,
                seen=s.seen + 1,
                history=history,
                mean=(1 - self.omega) * s.mean + self.omega * h,
                variance=(1 - self.omega) * s.variance + self.omega * off * off,
                reference=reference,
            )
        active_steps = s.active_steps + active
        closes = closes or (active and active_steps == self.max_active_steps)
        fallback = s.step if closes else s.fallback_step
        return dataclasses.replace(s, step=s.step + 1, active_steps=active_steps, fallback_step=fallback), z, streak


# ----------------------------------------------------------------------------------------------- tensors, in blocks


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: the type in which ratios, norms and moves are computed."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, some at a time: temporaries stay small and, on a CPU, in cache. Where one row is
    larger than a block, the same slices of the longest dimension."""
    first = tensors[0]
    block = 2**17 if first.device.type == "cpu" else 2**24
    if first.dim() == 0 or first.numel() <= block:
        yield tensors
    else:
        dim = 0 if first.numel() <= block * len(first) else first.shape.index(max(first.shape))
        width = max(1, block * first.shape[dim] // first.numel())
        yield from zip(*(torch.split(t, width, dim) for t in tensors), strict=True)


def _wide_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for block in _blocks(*tensors):
        yield tuple(t.to(_wide_dtype(t.dtype)) for t in block)


def _sum(blocks: Iterable[Tensor]) -> Tensor:
    total: Tensor = functools.reduce(torch.add, blocks)
    return total


def _norm(blocks: Iterable[Tensor]) -> Tensor:
    """2-norm of all blocks together. Block by block, because one float32 sum over 7e7 numbers is 0.4 % off on a CPU."""
    norms = [torch.linalg.vector_norm(block) for block in blocks]
    whole: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return whole


# ------------------------------------------------------------------------------------------------- tensors, on ranks


def _local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (DTensor, as FSDP2 makes them); of any other, itself."""
    to_local: Callable[[], Tensor] = getattr(t, "to_local", lambda: t)
    return to_local()


def _grad(p: Tensor) -> Tensor:
    """This rank's part of p's gradient; of a parameter that has one."""
    assert p.grad is not None  # _params_with_grad() saw to it
    return _local(p.grad)


def _shards(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of ranks whose parts of p make up the whole. Replicas are in none: they would count twice."""
    split = [n for n, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
    mesh: Any = getattr(p, "device_mesh", None)
    return tuple(mesh.get_group(n) for n in split if mesh.size(n) > 1)


def _over_shards(values: list[Tensor], params: Iterable[Tensor], power: int = 1) -> list[Tensor]:
    """From a figure of this rank's part of each parameter that of the whole: their sum, or with power=2 the root of
    their squares' sum. One all_reduce for each mesh that shards; none where nothing is sharded."""
    alike: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for n, p in enumerate(params):
        alike.setdefault(_shards(p), []).append(n)
    for groups, at in alike.items():
        if groups:
            whole = torch.stack([values[n].double() for n in at]) ** power
            for group in groups:
                dist.all_reduce(whole, group=group)
            for n, value in zip(at, whole ** (1 / power), strict=True):
                values[n] = value.to(values[n].dtype)
    return values


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
    return None


# ------------------------------------------------------------------------------------------- the optimizer's own state


_Dict = dict[Any, Any]
_Saved = list[tuple[_Dict, _Dict]]  # (a live dict, its entries as key -> (value, copy of the value))


def _copy_state(opt: torch.optim.Optimizer) -> tuple[_Dict, _Saved]:
    """All that opt.step() may write besides parameters: its state and what it keeps in its groups."""

    def entries(d: _Dict) -> _Dict:
        kept = {k: v for k, v in d.items() if k != "params"}
        return {k: (v, v.clone() if isinstance(v, Tensor) else deepcopy(v)) for k, v in kept.items()}

    dicts = [d for d in opt.state.values() if isinstance(d, dict)]  # one per parameter; some keep a counter beside
    return dict(opt.state), [(d, entries(d)) for d in (*dicts, *opt.param_groups)]


def _restore_state(opt: torch.optim.Optimizer, saved: tuple[_Dict, _Saved]) -> None:
    """The same tensors with their old values (copies of those inside lists and dicts); entries made since then removed.
    Never through load_state_dict, which may cast (ATM-02)."""
    state, dicts = saved
    for p in opt.state.keys() - state.keys():
        del opt.state[p]
    opt.state.update(state)
    for d, entries in dicts:
        for k in d.keys() - entries.keys() - {"params"}:
            del d[k]
        for k, (value, copy) in entries.items():
            d[k] = value.copy_(copy) if isinstance(value, Tensor) else deepcopy(copy)


def _rng_states(params: list[Tensor]) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """(setter, state) of the CPU's random generator and of those of the parameters' devices."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    for device in {p.device for p in params if p.device.type != "cpu"}:
        module = getattr(torch, device.type)
        states.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return states


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
    mean_q: float | None  # over all coordinates
    multiplier: float | None  # 1 + 2 alpha mean_q: a plain step at so many times the learning rate moves about as far
    statistic: float | None  # h
    z: float | None
    streak: int  # surprising observations in a row, this one included
    fallback_step: int | None  # the step that closed the gate, while it is closed

    @property
    def active(self) -> bool:
        return self.outcome == "active"

    def metrics(self, prefix: str = "gxpo/") -> dict[str, float]:
        """A flat dict of floats, as loggers take it."""
        names = ("passes", "loss", "mean_q", "multiplier", "statistic", "z", "streak", "fallback_step")
        values = {name: getattr(self, name) for name in names}
        values |= {name: self.outcome == name.replace("_", " ") for name in ("active", "rolled_back", "skipped")}
        values |= zip(("grad_norm_initial", "grad_norm_second", "grad_norm_corrective"), self.grad_norms, strict=False)
        return {prefix + name: float(value) for name, value in values.items() if value is not None}


@dataclass
class _Step:
    """Scratch of the step in progress."""

    active: bool
    owned: bool = False  # by passes() or step(closure), which clip the last gradient too; lookahead() leaves it alone
    ready: bool = False  # every gradient is there, the last optimizer step is not done
    outcome: str = "single"
    why: str = ""
    passes: int = 0
    norm: float = 0.0  # of the gradient at hand
    norms: list[float] = field(default_factory=list)
    loss: float | None = None
    groups: list[Any] = field(default_factory=list)  # learning rates and parameters, as no pass may change them
    replay: dict[Tensor, Tensor] | None = None  # check_same_batch: g0 as it was the first time
    # Tensors from here on are this rank's parts, keyed by the whole parameter.
    theta0: dict[Tensor, Tensor] = field(default_factory=dict)
    kept: dict[Tensor, Tensor] = field(default_factory=dict)  # g0 (theta1 for the displacement's estimators), then q
    g0: dict[Tensor, Tensor] = field(default_factory=dict)  # for the statistic that needs it after q took its place
    state: tuple[_Dict, _Saved] | None = None  # s0
    moved: list[Tensor] = field(default_factory=list)  # |u0| of each parameter, for the displacement's estimators
    sizes: dict[Tensor, float] = field(default_factory=dict)  # |c0 g0| or |u0| of each, read with the figures of a pass
    sum_q: list[Tensor] = field(default_factory=list)
    mean_q: float | None = None
    statistic: float | None = None


class GXPO(torch.optim.Optimizer):
    """GXPO around a built torch optimizer; see the module's docstring for the step.

    base: any torch.optim.Optimizer that steps from .grad without a closure. Its param_groups and state are GXPO's own.
    horizon: K, the number of steps to predict, an int >= 2; 2 is SFPO with two fast steps. (paper: 3, 5, 10)
    alpha: part of the way to thetaK, a number >= 0. (paper: 0.1 to 1, first 0.5)
    estimator: where r comes from. "gradient" (paper); "displacement", what the optimizer did in place of what the
        gradient said; "tensor", the same as one number per tensor, which keeps the update's direction. (ours)
    optimizer_state: "keep", the corrective step goes on from s2, so the state advances three times a step (paper's
        first); "restore", it starts from s0 and the fast steps leave no trace (paper's later).
    max_grad_norm: C, clips each gradient by its global norm; None: no clipping. Do not clip in the closure: the gate
        and the ratio have to see the norm as it was.
    gate: when to fall back to single passes; None: never.
    rollback: keep a copy of the optimizer's state through each active step, so that a failed one leaves no trace.
        False saves that memory with optimizer_state="keep" and gives up just this: parameters still return to theta0,
        the optimizer's state keeps the fast steps that a failed step had made.
    replay_rng: give every pass the random numbers of the first, so that dropout masks agree (not under lookahead(),
        where the first pass is the trainer's). BatchNorm still updates its running statistics in every pass: keep
        such layers in eval mode.
    check_same_batch: a debugging aid: take the gradient at theta0 twice, RuntimeError where it comes out different (by
        over 1 % of its norm), for then the passes do not see the same batch. Costs a fourth pass and a buffer.
    process_group: the ranks that train together; None: all of them (torch.distributed's default group). Each rank's
        gradient has to be that of all (DDP, or FSDP2, or tensors sharded as DTensors). The same figures then decide
        everything on all ranks. Ranks that train apart need a group each.

    Raises ValueError for a value out of bounds, TypeError for a base or parameters that cannot be wrapped.
    """

    base: torch.optim.Optimizer
    gate: Gate
    gate_state: GateState
    report: Report  # of the last step; before the first it is None
    process_group: dist.ProcessGroup | None  # not kept by copies and pickles

    _open: _Step | None  # the step in progress
    _loss: Tensor | float | None  # handed in by observe(), of the pass at hand
    _supplied: float | None  # likewise, the gate's statistic
    _left: bool  # a passes() loop was left early
    _begun: int  # steps begun, which ranks compare
    _pinned: tuple[float, float]  # the norm before this one, and how often norms stood still

    # An enabled GradScaler announces itself only to optimizers with this flag; step() then refuses it.
    _step_supports_amp_scaling = True
    FAST_STEPS = 2
    _SETTINGS = (
        *("horizon", "alpha", "estimator", "optimizer_state", "max_grad_norm", "gate"),
        *("rollback", "replay_rng", "check_same_batch"),
    )

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
        check_same_batch: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if type(base).__module__.startswith("deepspeed") or type(base).__name__ == "ZeroRedundancyOptimizer":
            raise TypeError(f"{type(base)} keeps its state on other ranks and steps by itself: use FSDP2 or DDP")
        if not isinstance(base, torch.optim.Optimizer) or isinstance(base, GXPO | torch.optim.LBFGS):
            raise TypeError(f"base must be a torch.optim.Optimizer that steps without a closure, got {type(base)}")
        if not hasattr(base, "_optimizer_state_dict_pre_hooks"):  # accelerate's prepared optimizer, for one
            raise TypeError(f"{type(base)} only wraps an optimizer: give that one to GXPO, and GXPO to prepare()")
        for why in filter(None, (_unfit(p) for g in base.param_groups for p in g["params"])):
            raise TypeError(why)
        _require(_is_int(horizon, 2), "horizon", "an int >= 2", horizon)
        _require(_is_number(alpha) and alpha >= 0, "alpha", "a number >= 0", alpha)
        _require(estimator in ESTIMATORS, "estimator", f"one of {ESTIMATORS}", estimator)
        _require(optimizer_state in STATE_POLICIES, "optimizer_state", f"one of {STATE_POLICIES}", optimizer_state)
        clip_ok = max_grad_norm is None or _is_number(max_grad_norm, above=0)
        _require(clip_ok, "max_grad_norm", "None or a number > 0", max_grad_norm)
        _require(gate is None or isinstance(gate, Gate), "gate", "None (never) or a Gate", gate)
        switches = {"rollback": rollback, "replay_rng": replay_rng, "check_same_batch": check_same_batch}
        for name, value in switches.items():
            _require(isinstance(value, bool), name, "True or False", value)
        self.base, self.gate_state, self.report = base, GateState(), cast("Report", None)
        self.horizon, self.alpha, self.estimator, self.optimizer_state = horizon, alpha, estimator, optimizer_state
        self.max_grad_norm, self.gate = max_grad_norm, gate or Gate("never")
        self.rollback, self.replay_rng, self.check_same_batch = rollback, replay_rng, check_same_batch
        self.__setstate__({})
        self.process_group = process_group

    # -- the step

    @torch.no_grad()
    def lookahead(self) -> bool:
        """Take in the gradient of the pass just done (in .grad) and do everything but the last optimizer step.

        True: parameters have moved and .grad is empty; run forward and backward again, on the same batch, and call
        this again. False: .grad holds the last gradient, UNCLIPPED; clip it if you like and call step() without a
        closure. If anything fails in between, call abort(). step(closure) and passes() are built on this.

        Raises RuntimeError where no parameter has a gradient, TypeError for sparse ones. Both end the step: parameters
        and optimizer state are as before it, .grad is empty.
        """
        step = self._open or self._begin()
        if step.ready:
            raise RuntimeError("lookahead() has returned False: call step() now, or abort()")
        try:
            more = self._lookahead(step)
            step.groups = self._groups()  # as this pass left them: some optimizers adapt their learning rate
            torch.clear_autocast_cache()  # or, inside one autocast block, theta0's casts would answer for theta1
            return more
        except BaseException:
            self.abort()
            raise

    def _lookahead(self, step: _Step) -> bool:
        params, norm, loss, cosine = self._read(step)
        if self.check_same_batch and step.active and not step.passes and not self._seen_twice(step, params, norm):
            return True
        step.passes, step.norm = step.passes + 1, norm
        first, fast = step.passes == 1, step.passes <= self.FAST_STEPS
        if step.outcome != "rolled back":  # there this pass repeats the first
            step.norms.append(norm)
            step.loss = loss if first else step.loss

        if not (math.isfinite(norm) and math.isfinite(loss or 0.0)):
            return self._failed(step, "loss" if math.isfinite(norm) else "gradient")
        if step.active and first and norm == 0:  # NUM-01: nothing to extrapolate from, nothing for the gate to see
            step.active, step.why = False, "zero gradient"
        if not step.active:
            step.ready = True
            return False

        step.theta0 |= {p: _local(p).detach().clone() for p in params if p not in step.theta0}
        if fast:
            if first and (self.rollback or self.optimizer_state == "restore"):
                step.state = _copy_state(self.base)
            if first and self.gate.statistic == "disagreement":
                step.g0 = {p: _grad(p).clone() for p in params}
            self._clip(params, norm)
            self._fast_step(step, params)
            if step.passes == self.FAST_STEPS:
                self._move(step)
                if self.optimizer_state == "restore" and step.state is not None:
                    _restore_state(self.base, step.state)  # OPT-05: the fast steps leave no trace in it
            self.zero_grad()
        else:
            step.outcome, step.ready = "active", True
            step.statistic = {
                "corrective_norm": norm,  # before clipping: after it the norm saturates at C and says nothing (CLP-03)
                "initial_norm": step.norms[0],
                "disagreement": 1 - abs(cosine),
                "supplied": self._supplied,
                "never": None,
            }[self.gate.statistic]
        return fast

    def _failed(self, step: _Step, what: str) -> bool:
        """A non-finite first pass skips the step (NUM-02); a later one starts it over as a single pass (NUM-03)."""
        why = f"non-finite {what} in pass {step.passes}"
        step.why = f"{step.why}, then {why}" if step.outcome == "rolled back" else why
        again = step.active and step.passes > 1
        if again:
            self._rewind(step)
        step.active, step.ready, step.outcome = False, not again, "rolled back" if again else "skipped"
        return again

    def _fast_step(self, step: _Step, params: list[Tensor]) -> None:
        """One of the two optimizer steps that show how the gradient changes. Keeps g0 after the first (theta1 for the
        estimators that watch displacements), and turns it into q with the second."""
        first, by_gradient = step.passes == 1, self.estimator == "gradient"
        if by_gradient and first:
            step.kept = {p: _grad(p).clone() for p in params}
        elif by_gradient:  # now, while the optimizer has not touched .grad
            step.kept = {p: g0 for p, g0 in step.kept.items() if p.grad is not None}
            step.sum_q = self._scale_(step, {p: (g0, _grad(p)) for p, g0 in step.kept.items()})
        self.base.step()
        if not by_gradient and first:
            step.kept = {p: _local(p).detach().clone() for p in params}
            moves = [_norm(b - a for a, b in _wide_blocks(step.theta0[p], theta1)) for p, theta1 in step.kept.items()]
            step.moved = _over_shards(moves, params, power=2)
        elif not by_gradient:
            points = {p: (step.theta0[p], theta1, _local(p).detach()) for p, theta1 in step.kept.items()}
            step.sum_q = self._scale_(step, points)

    def _scale_(self, step: _Step, observed: Mapping[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
        """Turn what is kept into q, from (g0, g1) or (theta0, theta1, theta2). Returns each parameter's sum of q."""

        def changes(p: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            for block in _wide_blocks(*observed[p]):
                yield block if len(block) == 2 else (block[1] - block[0], block[2] - block[1])  # u0, u1

        if self.estimator == "tensor":  # EST-12: <u0, u1> / <u0, u0>, by unit vectors because |u0|^2 may underflow
            sizes = [(p, step.sizes[p]) for p in step.kept]
            dots = [_sum(((u0 / size) * (u1 / size)).sum() for u0, u1 in changes(p)) for p, size in sizes]
            for q, r in zip(step.kept.values(), _over_shards(dots, step.kept), strict=True):
                q.copy_(extrapolation_scale(r.nan_to_num_(0.0, 0.0, 0.0).clamp_(-2.0, 3.0), self.horizon))
        else:
            for p, out in step.kept.items():
                rms = step.sizes[p] / math.sqrt(max(1, p.numel()))  # of the whole tensor, sharded or not (EST-02)
                for (q,), (before, after) in zip(_blocks(out), changes(p), strict=True):
                    q.copy_(extrapolation_scale(retention_ratio(before, after, rms), self.horizon))
        return [q.sum(dtype=_wide_dtype(q.dtype)) for q in step.kept.values()]

    def _move(self, step: _Step) -> None:
        """theta~ = theta0 + alpha q (theta2 - theta0); q = 1 for a parameter without two gradients to compare."""
        for p, theta0 in step.theta0.items():
            q = [step.kept[p]] if p in step.kept else []
            tensors = (_local(p).detach(), theta0, *q)
            for (x, *_), (theta2, origin, *scale) in zip(_blocks(*tensors), _wide_blocks(*tensors), strict=True):
                scale = scale or [theta2.new_ones(())]
                x.copy_(torch.addcmul(origin, theta2 - origin, *scale, value=self.alpha))

    @torch.no_grad()
    def _last_step(self) -> None:
        step = self._open
        if step is None or not step.ready:
            raise RuntimeError(
                "step() needs a closure that runs forward and backward and returns the loss; without one it only ends "
                "a lookahead() that has returned False, and passes() calls it by itself"
            )
        try:
            active = step.outcome == "active"
            gate_state, z, streak = self.gate.after(self.gate_state, active, step.statistic)
            if step.outcome != "skipped":
                if step.owned:
                    self._clip(self._params_with_grad(), step.norm)
                self.base.step()
            closed = not self.gate.is_open(gate_state)
            report = Report(
                step=self.gate_state.step,
                outcome=step.outcome,
                why=step.why or ("the gate closes" if active and closed else ""),
                passes=step.passes + (step.replay is not None),
                loss=step.loss,
                grad_norms=tuple(step.norms),
                mean_q=step.mean_q,
                multiplier=None if step.mean_q is None else 1 + 2 * self.alpha * step.mean_q,
                statistic=step.statistic,
                z=z,
                streak=streak,
                fallback_step=gate_state.fallback_step if closed else None,
            )
        except BaseException:
            self.abort()
            raise
        self.gate_state, self.report = gate_state, report  # nothing of a failed step reaches the gate (ATM-03)
        for grad in self._grads() if step.owned else ():
            setattr(grad, _SPENT, True)
        self._close()

    # -- the two wrappers

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One outer step. `closure` runs forward and backward of the whole batch, all micro-batches, and returns the
        loss; it is called three times while active, once after fallback. Returns the loss at theta0.

        Without a closure: the last optimizer step after a lookahead() that has returned False.

        Raises TypeError where the closure returns None, RuntimeError for no gradients, an enabled GradScaler or a call
        inside passes(). These, and whatever the closure raises, leave parameters and optimizer state as they were
        (under FSDP2, see abort()).
        """
        if hasattr(self, "found_inf"):
            for mark in ("found_inf", "grad_scale"):
                delattr(self, mark)
            raise RuntimeError(
                "GXPO cannot run under an enabled GradScaler, which would hide skipped inner steps: use bfloat16, or "
                "GradScaler(enabled=False)"
            )
        if closure is None:
            return self._last_step()
        first = None
        with contextlib.closing(self._passes(self._last_step)) as passes:
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

        Runs three times while active, once after fallback. A non-finite pass 2 or 3 is followed by one more turn, which
        ends the step from theta0; check_same_batch numbers two turns 0. Leaving it early (break, return, an exception
        that you catch) puts everything back; so that a forgotten break cannot pass for training, the next step then
        raises RuntimeError once, unless abort() was called.
        """
        yield from self._passes(self.step)  # through step(): its hooks run and schedulers see that it was called

    def _passes(self, last: Callable[[], Any]) -> Generator[int, None, None]:
        step = self._begin(owned=True)
        try:
            rng = _rng_states(self._params()) if self.replay_rng else []
            while True:
                self.zero_grad()
                yield step.passes
                if self._open is not step:
                    raise RuntimeError("abort() was called inside the loop: leave it")
                if not self.lookahead():
                    break
                for setter, state in rng:
                    setter(state)
            last()
        except BaseException as error:
            if self._open is step:
                self.abort()
                self._left = isinstance(error, GeneratorExit) and last != self._last_step  # passes(), left by a break
            raise

    # -- what goes with it

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

    @torch.no_grad()
    def abort(self) -> None:
        """Drop the step in progress: parameters and optimizer state are as before it. Harmless where there is none.

        Under FSDP2 an exception that is caught may leave modules gathered, at the point that was dropped: call
        module.reshard() on every FSDPModule before the model is used again.
        """
        if self._open is not None:
            self._rewind(self._open)
        self._close()
        self._left = False

    @property
    def active(self) -> bool:
        """Whether the next step is an active one (three passes) or a single pass."""
        return self.gate.is_open(self.gate_state)

    def _begin(self, owned: bool = False) -> _Step:
        if "base" not in self.__dict__:
            raise RuntimeError(
                "this wrapper only looks like a GXPO (Lightning's self.optimizers()): call passes() and lookahead() on "
                "the GXPO itself, self.optimizers().optimizer"
            )
        if self._left:
            self._left = False
            raise RuntimeError(
                "the last passes() loop was left before its end, and everything was put back: let it run out (no break "
                "or return in it); if it was meant, or you caught an exception, call abort() first"
            )
        self._require_idle("another step")
        unknown = [grad for grad in self._grads() if owned and not hasattr(grad, _SPENT)]
        if any(hasattr(grad, "to_local") or grad.count_nonzero() for grad in unknown):  # zeros made beforehand are none
            raise RuntimeError(
                "there are gradients that no pass has made, and this step would lose them: every micro-batch belongs "
                "into every pass (with Lightning, accumulate_grad_batches=1). If they are old ones, zero_grad() first"
            )
        closed_at = self.gate_state.fallback_step
        why = "" if self.active else "gate closed" if closed_at is None else f"gate closed at step {closed_at}"
        self._begun += 1
        self._open = _Step(self.active, owned, why=why)
        return self._open

    def _close(self) -> None:
        self._open = self._loss = self._supplied = None
        torch.clear_autocast_cache()

    def _rewind(self, step: _Step) -> None:
        """theta0, and s0 where it was copied; copy_ keeps the tensors that others hold."""
        for p, theta0 in step.theta0.items():
            _local(p).detach().copy_(theta0)
        if step.state is not None:
            _restore_state(self.base, step.state)
        self.zero_grad()

    def _params(self) -> list[Tensor]:
        """Every parameter once, whichever groups name it."""
        return list(dict.fromkeys(p for g in self.param_groups for p in g["params"]))

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params() if p.grad is not None]

    def _params_with_grad(self) -> list[Tensor]:
        params = [p for p in self._params() if p.grad is not None]
        if not params:
            raise RuntimeError("no parameter has a gradient: was backward() called, on a loss that depends on them?")
        for p in params:
            grad = _grad(p)
            if grad.layout != torch.strided or grad.is_complex():
                kind = f"{grad.layout} {grad.dtype}"
                raise TypeError(f"GXPO takes dense real gradients only, got {kind} for a parameter of {tuple(p.shape)}")
            layouts = [getattr(t, "placements", None) for t in (p, p.grad)]
            if layouts[0] != layouts[1]:
                raise TypeError(f"a gradient must be sharded as its parameter is, got {layouts[1]} for {layouts[0]}")
            if why := _unfit(p):
                raise TypeError(why)
        return params

    def _groups(self) -> list[Any]:
        """Each group's learning rate (None for one on a device, which reading would wait for) and parameters."""
        rates = [g.get("lr") for g in self.param_groups]
        rates = [None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr or 0) for lr in rates]
        return [(lr, [id(p) for p in g["params"]]) for lr, g in zip(rates, self.param_groups, strict=True)]

    def _checked(self, step: _Step) -> list[Tensor]:
        """The parameters with a gradient. Raises for a pass that cannot be used."""
        step.groups = step.groups or self._groups()
        if step.groups != self._groups():
            raise RuntimeError(
                "a learning rate or the set of parameters changed between the passes of one step: call schedulers, "
                "add_param_group() and the like after the step, not in the closure"
            )
        if step.active and not step.passes and self.gate.statistic == "supplied" and self._supplied is None:
            raise RuntimeError("the gate's statistic is supplied: call observe(statistic=...) in the first pass")
        return self._params_with_grad()

    def _read(self, step: _Step) -> tuple[list[Tensor], float, float | None, float]:
        """The parameters with a gradient, |g|, the loss, and cos(g0, g) where it is wanted: the same on every rank."""
        params, problem = [], None
        try:
            params = self._checked(step)
        except (RuntimeError, TypeError) as error:
            problem = error
        rows = self._everyone([problem is not None, self._begun, step.passes])
        if problem is not None:
            raise problem
        for rank, (failed, *_) in enumerate(rows):
            if failed:
                raise RuntimeError(
                    f"rank {rank} cannot use its gradient, as its own error says: no rank makes this step"
                )
        if any(row != rows[0] for row in rows):
            self._begun = max(int(begun) for _, begun, _ in rows)
            raise RuntimeError(
                "the ranks are not in the same pass of the same step: an exception was caught on one of them, say. All "
                "are back where their steps began; let an exception end the step on every rank"
            )

        norm, loss, cosine = self._figures(step, params)
        rows = self._everyone([norm, cosine, loss is not None, loss or 0.0, self._supplied or 0.0])
        norms, cosines, told, losses, supplied = zip(*rows, strict=True)
        finite = all(map(math.isfinite, norms))
        if finite and max(norms) > 1.001 * min(norms):
            raise RuntimeError(
                f"the norm of the gradient differs between ranks, {min(norms):g} to {max(norms):g}: it has to be the "
                "gradient of all ranks' data (DDP, FSDP2; no no_sync() around the last micro-batch; not a pipeline's "
                "stages), of tensors that are whole or DTensors. Ranks that train apart need a process_group each"
            )
        norm = norms[0] if finite else math.nan
        loss = sum(losses) / sum(told) if any(told) else None
        self._supplied = None if self._supplied is None else sum(supplied) / len(supplied)
        self._watch(norm)
        return params, norm, loss, cosines[0]

    def _everyone(self, mine: list[float]) -> list[list[float]]:
        """A row of figures from each of the ranks that train together; without torch.distributed, just this one."""
        ranks = dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1
        if ranks < 2:
            return [mine]
        device = self._params()[0].device
        rows = torch.zeros(ranks, len(mine), dtype=torch.float64, device=device)
        rows[dist.get_rank(self.process_group)] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(rows, group=self.process_group)
        return rows.tolist()  # HOST SYNC, on several ranks only

    def _figures(self, step: _Step, params: list[Tensor]) -> tuple[float, float | None, float]:
        """|g|, the loss, and cos(g0, g) where it is wanted: the one host sync of a pass on one device."""
        last = step.active and step.passes == self.FAST_STEPS
        dots = {p: (_grad(p), step.g0[p]) for p in params if p in step.g0} if last else {}
        figures: dict[str, list[Tensor]] = {
            "norm": _over_shards([_norm(b for (b,) in _wide_blocks(_grad(p))) for p in params], params, power=2),
            "loss": [self._loss.reshape(())] if isinstance(self._loss, Tensor) else [],
            "dot": _over_shards([_sum((a * b).sum() for a, b in _wide_blocks(*pair)) for pair in dots.values()], dots),
            "size": step.moved if step.passes == 1 else [],
            "q": _over_shards(step.sum_q, step.kept) if last else [],
        }
        device = params[0].device
        dtype = functools.reduce(torch.promote_types, {_grad(p).dtype for p in params}, torch.float32)
        flat = [figure.to(device, dtype) for kind in figures.values() for figure in kind]
        values: Iterator[float] = iter(torch.stack(flat).tolist())  # HOST SYNC
        read = {name: [next(values) for _ in fs] for name, fs in figures.items()}

        norm = math.hypot(*read["norm"])
        if not step.passes:
            c0 = clip_coefficient(norm, self.max_grad_norm)
            step.sizes = {p: c0 * size for p, size in zip(params, read["norm"], strict=True)}
        elif read["size"]:
            step.sizes = dict(zip(step.kept, read["size"], strict=True))
        loss = read["loss"][0] if isinstance(self._loss, Tensor) else self._loss
        self._loss = None
        if step.sum_q and last:
            not_scaled = sum(p.numel() for p in step.theta0 if p not in step.kept)
            step.mean_q = (math.fsum(read["q"]) + not_scaled) / max(1, sum(p.numel() for p in step.theta0))
        sizes = step.norms[0] * norm if dots else 0.0
        return norm, loss, math.fsum(read["dot"]) / sizes if sizes else 0.0

    def _watch(self, norm: float) -> None:
        """Say once when gradients seem to come clipped already: norms that differ by rounding from a round number."""
        at, (before, times) = float(f"{norm:.2g}"), self._pinned
        near = at > 0 and max(abs(norm - at), abs(before - at)) <= 1e-3 * at
        self._pinned = norm, times + (norm != before) if near else min(times, 0)  # the very same: a constant gradient
        if self._pinned[1] == 8:
            self._pinned = norm, -math.inf
            warnings.warn(
                f"the norm of the gradient stays at {at:g}: is it clipped in the closure, or before lookahead()? The "
                "gate and the ratio have to see it as it was: use max_grad_norm",
                stacklevel=2,
            )

    def _seen_twice(self, step: _Step, params: list[Tensor], norm: float) -> bool:
        """check_same_batch: False after the first gradient at theta0, which has to come once more."""
        grads = {p: _grad(p).clone() for p in params}
        if step.replay is None:
            step.replay = grads
            self.zero_grad()
            return False
        seen, nothing = step.replay | grads, torch.zeros(())
        changes = [grads.get(p, nothing.to(g)) - step.replay.get(p, nothing.to(g)) for p, g in seen.items()]
        norms = [_norm([change.to(_wide_dtype(change.dtype))]) for change in changes]
        off = math.hypot(*map(float, _over_shards(norms, seen, power=2)))
        step.replay = {}
        if off > 0.01 * norm:
            raise RuntimeError(
                f"check_same_batch: two gradients at theta0 differ by {off:.3g}, their norm is {norm:.3g}. Every pass "
                "has to use the same batch, rewards, advantages, old log-probabilities and random numbers"
            )
        return True

    def _clip(self, params: list[Tensor], norm: float) -> None:
        c = clip_coefficient(norm, self.max_grad_norm)
        if c < 1:
            for p in params:
                _grad(p).mul_(c)

    # -- being a torch.optim.Optimizer

    if not TYPE_CHECKING:  # a checker has them from Optimizer, as attributes
        param_groups = property(lambda self: self.base.param_groups)  # the base's own, never copies
        state = property(lambda self: self.base.state)
        defaults = property(lambda self: self.base.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def train(self) -> None:
        """For bases with two modes (schedule-free), which trainers switch; nothing for others."""
        getattr(self.base, "train", bool)()

    def eval(self) -> None:
        """As train()."""
        self._require_idle("eval()")
        getattr(self.base, "eval", bool)()

    def state_dict(self) -> dict[str, Any]:
        """The base's, tensors cloned, and "gxpo": plain scalars. Loads into a GXPO or into the base alone."""
        self._require_idle("state_dict()")
        gate = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.gate_state).items()}
        return {**deepcopy(self.base.state_dict()), "gxpo": {"version": __version__, "gate": gate}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From state_dict(); or from the base optimizer's own: the gate then starts anew; or {"gxpo": ...} alone, where
        the base's has been loaded by other means (torch.distributed.checkpoint)."""
        self._require_idle("load_state_dict()")
        saved = state_dict.get("gxpo", {"gate": {}})
        unknown = saved["gate"].keys() - GateState.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"gxpo {__version__} cannot read {sorted(unknown)}, saved by {saved.get('version')}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["gate"].items()}
        gate_state = GateState(**fields)
        if state_dict.keys() != {"gxpo"}:
            self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "gxpo"})
        self.gate_state = gate_state

    def _require_idle(self, what: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{what} in the middle of a step: finish it, or call abort() to drop it")

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("a copy")
        return {name: self.__dict__[name] for name in (*self._SETTINGS, "base", "gate_state", "report")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # fills __dict__ and makes the hook registries
        self._left, self._begun, self._pinned, self.process_group = False, 0, (0.0, 0), None
        self._close()
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            registry = f"_optimizer_{kind}_hooks"  # these run where the work is done, in the base; step hooks run here
            setattr(self, registry, getattr(self.base, registry))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._SETTINGS)
        return f"GXPO({settings}, base={self.base!r})"


# ------------------------------------------------------------------------------------------------------- self-check


def _self_check() -> None:
    """What someone who pasted this file wants to see."""
    curvature = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)
    seen: list[bool] = []

    def problem(**settings: Any) -> tuple[GXPO, Tensor, Callable[..., Tensor]]:
        theta = torch.ones(4, dtype=torch.float64, requires_grad=True)

        def closure(scale: float = 1.0) -> Tensor:
            loss = scale * 0.5 * (curvature * theta * theta).sum()
            torch.autograd.backward(loss)
            return loss

        return GXPO(torch.optim.SGD([theta], lr=0.5), **settings), theta, closure

    def check(what: str, ok: bool, saw: object) -> None:
        seen.append(ok)
        print(f"{'ok  ' if ok else 'FAIL'}  {what}: {saw}")

    print(f"gxpo.py {__version__}, spec {SPEC_VERSION}, torch {torch.__version__}")
    opt, theta, closure = problem(horizon=5, alpha=1.0)
    opt.step(closure)
    error = (theta.detach() - (1 - 0.5 * curvature) ** 6).abs().max().item()
    check("on a diagonal quadratic, alpha = 1, one step is K + 1 = 6 plain ones", error < 1e-14, f"error {error:.0e}")
    check("an active step takes three gradients", opt.report.passes == 3, opt.report.passes)

    opt, theta, closure = problem(gate=Gate(window=4, threshold=3.0, patience=1))
    for scale in (1.0, 1.0, 1.0, 1.0, 40.0, 1.0):
        opt.step(functools.partial(closure, scale))
    check("a spike of |g~| in step 4 closes the gate", opt.report.fallback_step == 4, opt.report.why)
    check("after it a step takes one gradient", opt.report.passes == 1, opt.report.passes)

    opt, theta, closure = problem()
    scales = iter((1.0, math.nan, 1.0))
    opt.step(lambda: closure(next(scales)))
    exact = torch.equal(theta.detach(), 1 - 0.5 * curvature)
    check("NaN in pass 2: back to theta0, one plain step", exact, f"{opt.report.outcome}, {opt.report.why}")
    if not all(seen):
        raise SystemExit(f"{seen.count(False)} of {len(seen)} checks failed: this copy of gxpo.py is not in order")
    print(f"{len(seen)} of {len(seen)} checks passed")


if __name__ == "__main__":
    _self_check()
