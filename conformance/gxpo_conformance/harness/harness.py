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
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gxpo_conformance import interrupt
from gxpo_conformance.harness.budget import Budget
from gxpo_conformance.harness.findings import (
    PHASES,
    Boom,
    CaseError,
    Failure,
    NeedsWindow,
    OutOfTime,
    in_float64,
    require_arrays,
    require_close,
    require_same,
    to_dtype,
)
from gxpo_conformance.harness.recorder import OWN, Recorder, Source
from gxpo_conformance.protocol import NEVER_FULL, Arrays, Config, Port, PortError, Session
from gxpo_reference.oracle import Oracle, Trace

TIME_LIMIT = 30.0  # seconds for one request; compiling included
FIRST_POINTS = {"update": 2, "fast steps": 3}  # for `judge`: how many points of a step it looks at


@dataclass
class Dialogue:
    """One session of the port, what was asked in it and what was answered; judges nothing but manners."""

    harness: Harness
    config: Config
    start: Arrays
    session: Session
    now: Arrays
    steps: list[Recorder] = field(default_factory=list)
    exact_ratio: bool = False  # r is a quotient without rounding, so that a case may stand on a pole of q
    untidy: bool = False  # gradients come in another order and memory layout than the parameters
    scribble: bool = False  # the loss writes into the arrays that it is given
    resumed_at: list[int] = field(default_factory=list)  # steps before which it was saved and loaded anew

    def step(self, source: Source, losses: Sequence[float] | None = None, statistic: float | None = None) -> Recorder:
        """One outer step of the port. `statistic`: what the caller hands in, in a session whose gate watches that."""
        recorder = Recorder(
            source,
            self.harness.dtype,
            self.now,
            losses,
            statistic=statistic,
            untidy=self.untidy,
            scribble=self.scribble,
        )
        self.steps.append(recorder)
        self.harness.latest = self
        self.harness.call("step", lambda: self.ask(recorder))
        if recorder.failure:  # the port swallowed it
            raise recorder.failure
        self.now = self.harness.params(self.session, self.now)
        return recorder

    def ask(self, recorder: Recorder) -> None:
        """Into the port. The keyword is passed where the gate watches it, so that a port without it needs no such
        argument."""
        if self.config["gate"]["statistic"] == "supplied":
            self.session.step(recorder, statistic=recorder.statistic)
        else:
            self.session.step(recorder)

    def raising(
        self, source: Source, at: int, statistic: float | None = None, what: type[BaseException] = Boom
    ) -> None:
        """A step whose gradient `at` (from 0) raises: the exception must come out and nothing may have changed."""
        recorder = Recorder(source, self.harness.dtype, self.now, raise_at=at, raise_what=what, statistic=statistic)
        self.steps.append(recorder)
        self.harness.latest = self
        raised = f"gradient {at + 1} raised" + ("" if what is Boom else f" {what.__name__}")
        try:
            with self.harness.limited("step"):
                self.ask(recorder)
        except (Failure, CaseError):
            raise
        except PortError as error:
            raise Failure(str(error), crash=True, timed_out=error.timed_out) from error
        except (Exception, what) as error:  # a port may wrap it, or pass it on as text over a wire
            if recorder.failure:
                raise recorder.failure from None
            if len(recorder.asked) <= at and OWN not in str(error):
                raise Failure(
                    f"the port's step raised {error!r} before gradient {at + 1} was asked", crash=True
                ) from error
            if OWN not in f"{error} {error.__cause__} {error.__context__}":
                if isinstance(error, KeyboardInterrupt):
                    raise  # the user's own
                raise Failure(f"{raised}, and this came out instead: {error!r}") from None
        else:
            if len(recorder.asked) <= at:
                counted = f"{len(recorder.asked)} gradients asked, should be at least {at + 1}"
                raise Failure(counted, phase="gradients asked", got=len(recorder.asked), wanted=at + 1)
            raise Failure(f"{raised}, and nothing came out of step()")
        after = self.harness.params(self.session, self.now)
        require_same(after, self.now, f"after gradient {at + 1} raised, theta")

    def resume(
        self,
        then: Source,
        statistic: float | None = None,
        losses: Sequence[float] | None = None,
        astray: bool = True,
    ) -> None:
        """Save, and go on in a fresh session. `then`: a step that the session which was saved takes afterwards, and,
        if `astray`, another one that was given the same: what was saved must follow neither."""
        now = self.now

        def step_astray() -> None:
            recorder = Recorder(then, self.harness.dtype, now, losses, statistic=statistic)
            self.harness.call("step", lambda: self.ask(recorder))

        saved = self.harness.call("save()", lambda: self.session.save())  # an adapter may have none
        step_astray()
        for again in (True, False) if astray else (False,):
            self.session = self.harness.session(now, self.config)
            self.harness.call("load()", lambda: self.session.load(saved))
            if again:
                step_astray()
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

    def raising(
        self, source: Source, at: int, statistic: float | None = None, what: type[BaseException] = Boom
    ) -> None:
        """A step whose gradient `at` (from 0) raises; the oracle makes no step."""
        n = len(self.talk.steps)
        try:
            self.talk.raising(source, at, statistic, what)
        except Failure as failure:
            raise failure.within(f"step {n}", step=n) from failure.__cause__

    def step(
        self,
        source: Source,
        losses: Sequence[float] | None = None,
        judge: str = "all",
        statistic: float | None = None,
    ) -> Trace:
        """One outer step beside the oracle's, whose trace is returned. `judge`: what of it is compared: "all"
        points, "counts" of gradients only, the first "update" (theta0, theta1) or both "fast steps" (theta~ as well). A
        clause judges just what it is about, so that one mistake does not fail them all."""
        n, start = len(self.talk.steps), self.talk.now
        try:
            recorder = self.talk.step(source, losses, statistic)
            trace = self.expect(recorder, start)
            trace = self.settled(trace, recorder, start, judge)
        except Failure as failure:
            raise failure.within(f"step {n}", step=n) from failure.__cause__
        self.traces.append(trace)
        return trace

    def expect(self, recorder: Recorder, start: Arrays) -> Trace:
        """The oracle's step from the same parameters, on the gradients that the port was given."""
        self.oracle.params = in_float64(start)
        trace = self.oracle.step(recorder.replay(), recorder.statistic)
        threshold = self.config["gate"]["threshold"]
        z = abs(trace.z) if trace.z is not None and self.config["gate"]["two_sided"] else trace.z
        if z is not None and abs(z - threshold) < 0.01 * threshold:
            raise CaseError(f"step {trace.step}: z = {z} lies within 1 % of the threshold {threshold}")
        if not self.fit(trace):
            raise CaseError(f"step {trace.step} is one that rounding could decide")
        return trace

    def settled(self, trace: Trace, recorder: Recorder, start: Arrays, judge: str) -> Trace:
        """The trace that the port followed. Where r is -1 and K even there are two right ones (EXT-05)."""
        before = copy(self.budget)
        try:
            self.compare(trace, recorder, start, judge)
        except Failure as failure:
            if (other := neutral_at_minus_one(trace, self.oracle)) is None:
                raise
            self.budget = before
            try:
                self.compare(other, recorder, start, judge)
            except Failure:
                raise failure from None
            self.oracle.state = other.states["s'"]
            return other
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
                self.used = max(self.used, require_close(got, want, budget, phase))
        if first:
            return
        # After a failed pass or a zero gradient g0 may be asked for again: both are right (NUM-01 to NUM-03).
        again = asked_again(trace) and len(seen) == len(trace.asked) + 1
        if again and judge == "all":
            require_same(seen[-1], start, "theta0, asked again,")
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
            self.used = max(self.used, require_close(self.talk.now, want, end, "theta'"))


def asked_again(trace: Trace) -> bool:
    """Whether a port may ask for g0 once more in this step."""
    return trace.outcome in ("rolled back", "skipped") or (trace.outcome == "single" and trace.norms[0] == 0.0)


def neutral_at_minus_one(trace: Trace, oracle: Oracle) -> Trace | None:
    """The same active step with q = 1 where r is -1, which for even K is as right as K/2; None where that is no other
    step."""
    if trace.outcome != "active" or trace.r is None or trace.q is None or oracle.config["horizon"] % 2:
        return None
    there = {k: (np.abs(1.0 + r) <= 1e-8) & (trace.q[k] != 1.0) for k, r in trace.r.items()}
    if not any(at.any() for at in there.values()):
        return None
    theta0, theta2, alpha = trace.points["theta0"], trace.points["theta2"], oracle.config["alpha"]
    q = {k: np.where(at, 1.0, trace.q[k]) for k, at in there.items()}
    tilde = {k: theta0[k] + alpha * q[k] * (theta2[k] - theta0[k]) for k in theta0}
    g = {k: trace.clips[2] * g for k, g in trace.grads[2].items()}
    end, state = oracle.U(tilde, trace.states["s2" if oracle.config["optimizer_state"] == "keep" else "s0"], g)
    points = {**trace.points, "theta~": tilde, "theta'": end}
    asked = [*trace.asked[:2], tilde]
    return replace(trace, q=q, points=points, asked=asked, states={**trace.states, "s'": state})


@dataclass
class Harness:
    """A port in one dtype on one device. `time_limit`: seconds for one request; None where the port sees to it."""

    port: Port
    capabilities: dict[str, Any]
    dtype: str
    device: str
    time_limit: float | None = TIME_LIMIT
    foremost: bool = True  # of the dtypes of a verdict the one in which all awkward runs are played
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
        except BaseException as error:  # SystemExit as well, and whatever else a port may raise
            if interrupt.is_the_users(error):
                raise
            raise Failure(f"the port's {what} raised {error!r}", crash=True) from error

    @contextlib.contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """Failure where what happens inside takes more than the time limit. Needs the main thread and SIGALRM."""
        here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        if self.time_limit is None or not here:
            with interrupt.insist():
                yield
            return

        def ring(*_: object) -> None:
            raise OutOfTime

        handler = signal.signal(signal.SIGALRM, ring)
        timer = signal.setitimer(signal.ITIMER_REAL, self.time_limit)
        try:
            with interrupt.insist():
                yield
        except OutOfTime:
            text = f"the port's {what} did not return within {self.time_limit:g} s"
            raise Failure(text, crash=True, timed_out=True) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)

    def params(self, session: Session, like: Arrays) -> Arrays:
        return require_arrays(self.call("params()", session.params), like, "params() gives")

    def begin(self, params: dict[str, Any], config: Config, exact_ratio: bool = False) -> Run:
        """A session from `params` (rounded to the run's dtype) and the oracle beside it."""
        talk = self.talk(params, config)
        talk.exact_ratio = exact_ratio
        return Run(talk, Oracle(in_float64(talk.start), talk.config), Budget(talk.config, self.dtype))

    def config(self, config: Config) -> Config:
        """`config`, with a state policy and a baseline that the port has where the case does not care. NeedsWindow
        where it does."""
        policies, gate = self.capabilities["optimizer_state"], config["gate"]
        if config["optimizer_state"] not in policies:
            config = {**config, "optimizer_state": policies[0]}
        if gate["baseline"] == "window" and "window" not in self.capabilities["gate_baselines"]:
            if gate["window"] < NEVER_FULL:
                raise NeedsWindow
            config = {**config, "gate": {**gate, "baseline": "ema", "threshold": 1e12}}  # never trips either
        return config

    def talk(self, params: dict[str, Any], config: Config) -> Dialogue:
        """A session from `params`, rounded to the run's dtype."""
        config = self.config(config)
        start = {k: to_dtype(v, self.dtype) for k, v in params.items()}
        session = self.session(start, config)
        talk = Dialogue(self, config, start, session, start)
        self.talks.append(talk)
        self.latest = talk
        talk.now = self.params(session, start)
        require_same(talk.now, start, "params() right after start()")
        return talk

    def session(self, start: Arrays, config: Config) -> Session:
        """A bare session of the port; arrays and config are its own copies."""
        copies, settings = deepcopy(start), deepcopy(config)
        made = self.call("start()", lambda: self.port.start(copies, settings, dtype=self.dtype, device=self.device))
        if missing := [f"{name}()" for name in ("step", "params") if not callable(getattr(made, name, None))]:
            what = "None" if made is None else f"a {type(made).__name__}"
            text = f"the port's start() gives {what}, which has no {' and no '.join(missing)}; it must return a session"
            raise Failure(text, crash=True)
        return made
