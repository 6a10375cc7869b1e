"""Runs a port beside the oracle, on the same gradients, and says where they part.

Gradients are scripted or computed by the suite; either way the oracle is given the very gradients that the port was
given, and every step starts the oracle from the parameters that the port was seen to have, so that one error shows
once, where it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gxpo_conformance.budget import ALLOWED, Budget
from gxpo_conformance.protocol import Arrays, Config, Gradient, Port, Session
from gxpo_reference.oracle import Oracle, Trace

MOST_ASKED = 12  # in one step; a port that goes on asking is stopped
PHASES = ("theta0, the first point asked,", "theta1, the second point asked,", "theta~, the third point asked,")

Script = Sequence[Arrays]  # the gradients of one step: the i-th call gets the i-th; a further call gets the first again
Source = Script | Gradient


class Failure(Exception):
    """The port does not do what the clause says."""


class CaseError(Exception):
    """The suite's own case is unfit (too near a threshold, say): never the port's fault."""


class Boom(Exception):
    """What the suite raises out of a gradient."""


@dataclass
class Recorder:
    """The gradient as the port sees it; keeps copies of what was asked and given."""

    source: Source
    dtype: str
    like: Arrays
    losses: Sequence[float] | None = None
    raise_at: int | None = None
    asked: list[Arrays] = field(default_factory=list)
    given: list[tuple[float, Arrays]] = field(default_factory=list)

    def __call__(self, params: Arrays) -> tuple[float, Arrays]:
        i = len(self.asked)
        self.asked.append(check_arrays(params, self.like, f"the port asked for a gradient (call {i + 1}) at"))
        if i >= MOST_ASKED:
            raise Failure(f"the port asked for more than {MOST_ASKED} gradients in one step")
        if i == self.raise_at:
            raise Boom(f"the suite's own exception, raised out of gradient {i + 1}")
        loss, grads = self.answer(i, self.asked[-1])
        self.given.append((loss, grads))
        return loss, {k: g.copy() for k, g in grads.items()}

    def answer(self, i: int, params: Arrays) -> tuple[float, Arrays]:
        if any(not np.isfinite([loss, *(g.sum() for g in grads.values())]).all() for loss, grads in self.given):
            i = 0  # a failed pass sends the port back to theta0
        if callable(self.source):
            loss, grads = self.source(in_float64(params))
        else:
            loss, grads = 0.5, self.source[i if i < len(self.source) else 0]
        if self.losses is not None and i < len(self.losses):
            loss = self.losses[i]
        return float(loss), {k: to_dtype(g, self.dtype) for k, g in grads.items()}


def to_dtype(values: Any, dtype: str) -> np.ndarray:
    """Rounded to `dtype`, as the array type that travels: float64, or float32 for float32 and bfloat16."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "float64":
        return values.copy()
    rounded = values.astype(np.float32)
    if dtype == "bfloat16":  # round to nearest, ties to even, on the upper 16 bits
        bits = rounded.view(np.uint32) if rounded.ndim else rounded.reshape(1).view(np.uint32)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        finite = np.isfinite(rounded)
        rounded = np.where(finite, kept.view(np.float32).reshape(rounded.shape), rounded)
    return np.asarray(rounded, dtype=np.float32)


def in_float64(arrays: Arrays) -> Arrays:
    """The same values, as the oracle and the toy problems take them."""
    return {k: v.astype(np.float64) for k, v in arrays.items()}


def check_arrays(arrays: Any, like: Arrays, what: str) -> Arrays:
    """Copies of `arrays`; Failure where names, shapes or dtypes are not those the session began with."""
    if not isinstance(arrays, dict) or arrays.keys() != like.keys():
        names = sorted(arrays) if isinstance(arrays, dict) else type(arrays).__name__
        raise Failure(f"{what} tensors {names}, not {sorted(like)}")
    for k, v in arrays.items():
        got, want = (np.shape(v), getattr(v, "dtype", type(v))), (like[k].shape, like[k].dtype)
        if got != want:
            raise Failure(f"{what} {k!r} of shape and dtype {got}, not {want}")
    return {k: np.array(v) for k, v in arrays.items()}


def check_close(got: Arrays, want: Arrays, budget: Arrays, phase: str) -> float:
    """Failure with the worst coordinate where `got` leaves `want` by more than ALLOWED budgets; else the most used."""
    worst, most = (ALLOWED, ""), 0.0
    for k, w in want.items():
        g, b = got[k].astype(np.float64), budget[k]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.where(g == w, 0.0, np.abs(g - w) / b)
        off = np.where(np.isnan(g), np.inf, off)
        most = max(most, off.max(initial=0.0))
        if off.size and not off.max() <= worst[0]:
            at = np.unravel_index(np.argmax(off), off.shape)
            place = f"{k}[{', '.join(str(int(i)) for i in at)}]" if off.ndim else k
            worst = (float(off[at]), f"{phase} differs: {place} is {float(g[at])!r}, should be {float(w[at])!r}")
    if worst[1]:
        raise Failure(f"{worst[1]}, {worst[0]:.3g} rounding budgets off ({ALLOWED:g} allowed)")
    return float(most)


def check_same(got: Arrays, want: Arrays, phase: str) -> None:
    """Failure where `got` is not `want` exactly."""
    check_close(got, in_float64(want), {k: np.zeros(v.shape) for k, v in want.items()}, phase)


@dataclass
class Run:
    """One session of the port with the oracle at its side."""

    bench: Bench
    config: Config
    session: Session
    oracle: Oracle
    budget: Budget
    now: Arrays
    steps: int = 0
    exact_ratio: bool = False
    traces: list[Trace] = field(default_factory=list)
    used: float = 0.0  # the most budgets that any point took

    def step(self, source: Source, losses: Sequence[float] | None = None, judge: str = "all") -> Trace:
        """One outer step beside the oracle's, whose trace is returned. `judge`: what of it is compared: "all"
        points, "counts" of gradients only, or the first "update" only (theta0 and theta1). A clause judges just what
        it is about, so that one mistake does not fail them all."""
        recorder = Recorder(source, self.bench.dtype, self.now, losses)
        start = self.now
        self.bench.call("step", lambda: self.session.step(recorder))
        self.now = self.bench.params(self.session, self.now)
        trace = self.expect(recorder, start)
        try:
            self.compare(trace, recorder, start, judge)
        except Failure as failure:
            raise Failure(f"step {self.steps}: {failure}") from None
        self.steps += 1
        self.traces.append(trace)
        return trace

    def expect(self, recorder: Recorder, start: Arrays) -> Trace:
        """The oracle's step from the same parameters, on the gradients that the port was given."""
        calls = iter(range(MOST_ASKED + 1))

        def replay(params: Arrays) -> tuple[float, Arrays]:
            i = next(calls)
            loss, grads = recorder.given[i] if i < len(recorder.given) else recorder.answer(i, params)
            return loss, in_float64(grads)

        self.oracle.params = in_float64(start)
        trace = self.oracle.step(replay)
        threshold = self.config["gate"]["threshold"]
        z = abs(trace.z) if trace.z is not None and self.config["gate"]["two_sided"] else trace.z
        if z is not None and abs(z - threshold) < 0.01 * threshold:
            raise CaseError(f"step {self.steps}: z = {z} lies within 1 % of the threshold {threshold}")
        return trace

    def compare(self, trace: Trace, recorder: Recorder, start: Arrays, judge: str) -> None:
        asked, end = self.budget.step(trace, self.exact_ratio)
        seen = recorder.asked
        if judge == "update":
            if len(seen) < 2:
                raise Failure(f"{len(seen)} gradients asked in an active step, should be 3: theta1 cannot be seen")
            seen = seen[:2]
        if judge != "counts":
            for got, want, budget, phase in zip(seen, trace.asked, asked, PHASES, strict=False):
                self.used = max(self.used, check_close(got, want, budget, phase))
        if judge == "update":
            return
        # After a rollback g0 may be asked for again: both are right (NUM-03).
        again = trace.outcome == "rolled back" and len(seen) == len(trace.asked) + 1
        if again and judge == "all":
            check_same(seen[-1], start, "theta0, asked again,")
        if not again and len(seen) != len(trace.asked):
            kind = f"{trace.outcome} step" + (f" ({trace.why})" if trace.why else "")
            raise Failure(f"{len(seen)} gradients asked, should be {len(trace.asked)}: {kind}")
        if judge == "all":
            want = trace.points.get("theta'", trace.points["theta0"])
            self.used = max(self.used, check_close(self.now, want, end, "theta', the end of the step,"))

    def raising(self, source: Source, at: int) -> None:
        """A step whose gradient `at` (from 0) raises: the exception must come out and nothing may have changed."""
        recorder = Recorder(source, self.bench.dtype, self.now, raise_at=at)
        try:
            self.session.step(recorder)
        except Failure:
            raise
        except Exception as error:  # a port may wrap it, or pass it on as text over a wire
            if "the suite's own exception" not in f"{error} {error.__cause__} {error.__context__}":
                raise Failure(f"gradient {at + 1} raised, and this came out instead: {error!r}") from None
        else:
            raise Failure(f"gradient {at + 1} raised, and nothing came out of step()")
        after = self.bench.params(self.session, self.now)
        check_same(after, self.now, f"after gradient {at + 1} raised, theta")


@dataclass
class Bench:
    """A port in one dtype on one device."""

    port: Port
    capabilities: dict[str, Any]
    dtype: str
    device: str

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (Failure, CaseError):
            raise
        except Exception as error:
            raise Failure(f"the port's {what} raised {error!r}") from error

    def params(self, session: Session, like: Arrays) -> Arrays:
        return check_arrays(self.call("params()", session.params), like, "params() gives")

    def config(self, config: Config) -> Config:
        """`config`, with a state policy that the port has where the case does not care."""
        declared = self.capabilities["optimizer_state"]
        return config if config["optimizer_state"] in declared else {**config, "optimizer_state": declared[0]}

    def begin(self, params: dict[str, Any], config: Config, exact_ratio: bool = False) -> Run:
        """A session from `params` (rounded to the run's dtype) and the oracle beside it."""
        config = self.config(config)
        start = {k: to_dtype(v, self.dtype) for k, v in params.items()}
        session = self.session(start, config)
        now = self.params(session, start)
        check_same(now, start, "params() right after start()")
        oracle = Oracle(in_float64(start), config)
        return Run(self, config, session, oracle, Budget(config, self.dtype), now, exact_ratio=exact_ratio)

    def session(self, start: Arrays, config: Config) -> Session:
        """A bare session of the port; arrays and config are its own copies."""
        copies, settings = deepcopy(start), deepcopy(config)
        return self.call("start()", lambda: self.port.start(copies, settings, dtype=self.dtype, device=self.device))
