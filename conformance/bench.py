"""Runs a port beside the oracle, on the same gradients, and says where they part.

Gradients are scripted or computed by the suite; either way the oracle is given the very gradients that the port was
given, and every step starts the oracle from the parameters that the port was seen to have, so that one error shows
once, where it is made.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gxpo_conformance.budget import ALLOWED, Budget
from gxpo_conformance.protocol import Arrays, Config, Gradient, Port, PortError, Session
from gxpo_reference.oracle import Oracle, Trace

MOST_ASKED = 12  # in one step; a port that goes on asking is stopped
TIME_LIMIT = 30.0  # seconds for one request; compiling included
PHASES = {
    "theta0": "theta0, the first point asked,",
    "theta1": "theta1, the second point asked,",
    "theta~": "theta~, the third point asked,",
    "theta'": "theta', the end of the step,",
}

FIRST_POINTS = {"update": 2, "fast steps": 3}  # for `judge`: how many points of a step it looks at

Script = Sequence[Arrays]  # the gradients of one step: the i-th call gets the i-th; a further call gets the first again
Source = Script | Gradient


@dataclass(frozen=True)
class Finding:
    """Where a port first parts from what is right. What a failure is not about is None."""

    text: str
    step: int | None = None  # number of the outer step in the case, from 0
    phase: str | None = None  # "theta0", "theta1", "theta~", "theta'", or "gradients asked"
    tensor: str | None = None
    coordinate: tuple[int, ...] | None = None
    got: float | None = None
    wanted: float | None = None
    budgets: float | None = None  # rounding budgets off; ALLOWED are allowed
    crash: bool = False  # it raised, died, hung or sent rubbish, in place of being wrong
    timed_out: bool = False


class Failure(Exception):
    """The port does not do what the clause says. `where` has Finding's fields."""

    def __init__(self, text: str, **where: Any) -> None:
        super().__init__(text)
        self.where = where

    def within(self, place: str, **where: Any) -> Failure:
        """The same failure, with the place it was found in."""
        return Failure(f"{place}: {self}", **self.where, **where)

    @property
    def finding(self) -> Finding:
        return Finding(str(self), **self.where)


class CaseError(Exception):
    """The suite's own case is unfit (too near a threshold, say): never the port's fault."""


class Boom(Exception):
    """What the suite raises out of a gradient."""


class OutOfTime(BaseException):
    """Raised into a port that computes past the limit; not an Exception, so that a port's `except` lets it pass."""


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
    failure: Failure | None = None  # raised into the port, which may have swallowed it

    def __call__(self, params: Arrays) -> tuple[float, Arrays]:
        i = len(self.asked)
        try:
            if i >= MOST_ASKED:
                raise Failure(
                    f"the port asked for more than {MOST_ASKED} gradients in one step", phase="gradients asked"
                )
            self.asked.append(check_arrays(params, self.like, f"the port asked for a gradient (call {i + 1}) at"))
        except Failure as failure:
            self.failure = failure
            raise
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

    def replay(self) -> Gradient:
        """The same answers for the oracle: what was given, and what would have been given to whoever asks on."""
        calls = iter(range(MOST_ASKED + 1))

        def answer(params: Arrays) -> tuple[float, Arrays]:
            i = next(calls)
            loss, grads = self.given[i] if i < len(self.given) else self.answer(i, params)
            return loss, in_float64(grads)

        return answer


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
    """Failure with the worst coordinate where `got` leaves `want` by more than ALLOWED budgets; else the most used.

    `phase`: one of PHASES, or words of the case's own.
    """
    worst, most, failure = ALLOWED, 0.0, None
    for k, w in want.items():
        g, b = got[k].astype(np.float64), budget[k]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.where(g == w, 0.0, np.abs(g - w) / b)
        off = np.where(np.isnan(g), np.inf, off)
        most = max(most, off.max(initial=0.0))
        if off.size and not off.max() <= worst:
            at = tuple(int(i) for i in np.unravel_index(np.argmax(off), off.shape))
            worst = float(off[at])
            place = f"{k}[{', '.join(map(str, at))}]" if at else k
            failure = Failure(
                f"{PHASES.get(phase, phase)} differs: {place} is {float(g[at])!r}, should be {float(w[at])!r}, "
                f"{worst:.3g} rounding budgets off ({ALLOWED:g} allowed)",
                phase=phase if phase in PHASES else None,
                tensor=k,
                coordinate=at,
                got=float(g[at]),
                wanted=float(w[at]),
                budgets=worst,
            )
    if failure:
        raise failure
    return float(most)


def check_same(got: Arrays, want: Arrays, phase: str) -> None:
    """Failure where `got` is not `want` exactly."""
    check_close(got, in_float64(want), {k: np.zeros(v.shape) for k, v in want.items()}, phase)


@dataclass
class Dialogue:
    """One session of the port, what was asked in it and what was answered; judges nothing but manners."""

    bench: Bench
    config: Config
    start: Arrays
    session: Session
    now: Arrays
    steps: list[Recorder] = field(default_factory=list)
    exact_ratio: bool = False  # r is a quotient without rounding, so that a case may stand on a pole of q
    resumed_at: list[int] = field(default_factory=list)  # steps before which it was saved and loaded anew

    def step(self, source: Source, losses: Sequence[float] | None = None) -> Recorder:
        """One outer step of the port."""
        recorder = Recorder(source, self.bench.dtype, self.now, losses)
        self.steps.append(recorder)
        self.bench.latest = self
        self.bench.call("step", lambda: self.session.step(recorder))
        if recorder.failure:  # the port swallowed it
            raise recorder.failure
        self.now = self.bench.params(self.session, self.now)
        return recorder

    def raising(self, source: Source, at: int) -> None:
        """A step whose gradient `at` (from 0) raises: the exception must come out and nothing may have changed."""
        recorder = Recorder(source, self.bench.dtype, self.now, raise_at=at)
        self.steps.append(recorder)
        try:
            with self.bench.limited("step"):
                self.session.step(recorder)
        except (Failure, CaseError):
            raise
        except PortError as error:
            raise Failure(str(error), crash=True) from error
        except Exception as error:  # a port may wrap it, or pass it on as text over a wire
            if "the suite's own exception" not in f"{error} {error.__cause__} {error.__context__}":
                raise Failure(f"gradient {at + 1} raised, and this came out instead: {error!r}") from None
        else:
            raise Failure(f"gradient {at + 1} raised, and nothing came out of step()")
        after = self.bench.params(self.session, self.now)
        check_same(after, self.now, f"after gradient {at + 1} raised, theta")

    def resume(self, then: Source) -> None:
        """Save, take the step `then` (what was saved must not follow it), and go on in a fresh session."""
        saved, now = self.bench.call("save()", self.session.save), self.now
        recorder = Recorder(then, self.bench.dtype, now)
        self.bench.call("step", lambda: self.session.step(recorder))
        self.session = self.bench.session(now, self.config)
        self.bench.call("load()", lambda: self.session.load(saved))
        self.resumed_at.append(len(self.steps))


@dataclass
class Run:
    """A dialogue with the oracle at its side."""

    talk: Dialogue
    oracle: Oracle
    budget: Budget
    fit: Callable[[Trace], bool] = lambda trace: True  # whether the case may be judged by this step
    traces: list[Trace] = field(default_factory=list)
    used: float = 0.0  # the most budgets that any point took

    @property
    def config(self) -> Config:
        return self.talk.config

    def raising(self, source: Source, at: int) -> None:
        """A step whose gradient `at` (from 0) raises; the oracle makes no step."""
        n = len(self.talk.steps)
        try:
            self.talk.raising(source, at)
        except Failure as failure:
            raise failure.within(f"step {n}", step=n) from failure.__cause__

    def step(self, source: Source, losses: Sequence[float] | None = None, judge: str = "all") -> Trace:
        """One outer step beside the oracle's, whose trace is returned. `judge`: what of it is compared: "all"
        points, "counts" of gradients only, the first "update" (theta0, theta1) or both "fast steps" (theta~ as well). A
        clause judges just what it is about, so that one mistake does not fail them all."""
        n, start = len(self.talk.steps), self.talk.now
        try:
            recorder = self.talk.step(source, losses)
            trace = self.expect(recorder, start)
            self.compare(trace, recorder, start, judge)
        except Failure as failure:
            raise failure.within(f"step {n}", step=n) from failure.__cause__
        self.traces.append(trace)
        return trace

    def expect(self, recorder: Recorder, start: Arrays) -> Trace:
        """The oracle's step from the same parameters, on the gradients that the port was given."""
        self.oracle.params = in_float64(start)
        trace = self.oracle.step(recorder.replay())
        threshold = self.config["gate"]["threshold"]
        z = abs(trace.z) if trace.z is not None and self.config["gate"]["two_sided"] else trace.z
        if z is not None and abs(z - threshold) < 0.01 * threshold:
            raise CaseError(f"step {trace.step}: z = {z} lies within 1 % of the threshold {threshold}")
        if not self.fit(trace):
            raise CaseError(f"step {trace.step} is one that rounding could decide")
        return trace

    def compare(self, trace: Trace, recorder: Recorder, start: Arrays, judge: str) -> None:
        asked, end = self.budget.step(trace, self.talk.exact_ratio, judge == "counts")
        seen = recorder.asked
        if first := FIRST_POINTS.get(judge):
            if len(seen) < first:
                raise Failure(
                    f"{len(seen)} gradients asked in an active step, should be 3: what this is about cannot be seen",
                    phase="gradients asked",
                    got=len(seen),
                    wanted=3,
                )
            seen = seen[:first]
        if judge != "counts":
            for got, want, budget, phase in zip(seen, trace.asked, asked, PHASES, strict=False):
                self.used = max(self.used, check_close(got, want, budget, phase))
        if first:
            return
        # After a rollback g0 may be asked for again: both are right (NUM-03).
        again = trace.outcome == "rolled back" and len(seen) == len(trace.asked) + 1
        if again and judge == "all":
            check_same(seen[-1], start, "theta0, asked again,")
        if not again and len(seen) != len(trace.asked):
            kind = f"{trace.outcome} step" + (f" ({trace.why})" if trace.why else "")
            raise Failure(
                f"{len(seen)} gradients asked, should be {len(trace.asked)}: {kind}",
                phase="gradients asked",
                got=len(seen),
                wanted=len(trace.asked),
            )
        if judge == "all":
            want = trace.points.get("theta'", trace.points["theta0"])
            self.used = max(self.used, check_close(self.talk.now, want, end, "theta'"))


@dataclass
class Bench:
    """A port in one dtype on one device. `time_limit`: seconds for one request; None where the port sees to it."""

    port: Port
    capabilities: dict[str, Any]
    dtype: str
    device: str
    time_limit: float | None = TIME_LIMIT
    talks: list[Dialogue] = field(default_factory=list)  # of the check in progress
    latest: Dialogue | None = None  # the one that spoke last

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        try:
            with self.limited(what):
                return function()
        except (Failure, CaseError):
            raise
        except PortError as error:
            raise Failure(str(error), crash=True, timed_out=error.timed_out) from error
        except (Exception, SystemExit) as error:
            raise Failure(f"the port's {what} raised {error!r}", crash=True) from error

    @contextlib.contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """Failure where what happens inside takes more than the time limit. Needs the main thread and SIGALRM."""
        here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        if self.time_limit is None or not here:
            yield
            return

        def ring(*_: object) -> None:
            raise OutOfTime

        handler = signal.signal(signal.SIGALRM, ring)
        timer = signal.setitimer(signal.ITIMER_REAL, self.time_limit)
        try:
            yield
        except OutOfTime:
            text = f"the port's {what} did not return within {self.time_limit:g} s"
            raise Failure(text, crash=True, timed_out=True) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)

    def params(self, session: Session, like: Arrays) -> Arrays:
        return check_arrays(self.call("params()", session.params), like, "params() gives")

    def begin(self, params: dict[str, Any], config: Config, exact_ratio: bool = False) -> Run:
        """A session from `params` (rounded to the run's dtype) and the oracle beside it."""
        talk = self.talk(params, config)
        talk.exact_ratio = exact_ratio
        return Run(talk, Oracle(in_float64(talk.start), talk.config), Budget(talk.config, self.dtype))

    def config(self, config: Config) -> Config:
        """`config`, with a state policy that the port has where the case does not care."""
        declared = self.capabilities["optimizer_state"]
        return config if config["optimizer_state"] in declared else {**config, "optimizer_state": declared[0]}

    def talk(self, params: dict[str, Any], config: Config) -> Dialogue:
        """A session from `params`, rounded to the run's dtype."""
        config = self.config(config)
        start = {k: to_dtype(v, self.dtype) for k, v in params.items()}
        session = self.session(start, config)
        talk = Dialogue(self, config, start, session, start)
        self.talks.append(talk)
        self.latest = talk
        talk.now = self.params(session, start)
        check_same(talk.now, start, "params() right after start()")
        return talk

    def session(self, start: Arrays, config: Config) -> Session:
        """A bare session of the port; arrays and config are its own copies."""
        copies, settings = deepcopy(start), deepcopy(config)
        return self.call("start()", lambda: self.port.start(copies, settings, dtype=self.dtype, device=self.device))
