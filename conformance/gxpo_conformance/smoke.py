"""A few questions that tell a broken adapter, and a port that hangs or dies, from a wrong method."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence

import numpy as np

from gxpo_conformance.clauses.table import CALIBRATION, clauses
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import AdapterError, Port, config
from gxpo_conformance.trial import Trial, applies, attempt

STATUS = (
    "Exit status: 0 adapter and method answer; 1 the method is wrong; 2 the adapter is broken, the port hangs or dies, "
    "or the command line is wrong; 130 interrupted by Ctrl-C."
)
TIME_LIMIT = 10.0  # seconds for one request: whoever tries out an adapter waits for it
METHOD = (CALIBRATION, "CST-01", "EXT-01", "MOV-01", "COR-01", "GAT-01", "GAT-08")
START = {"w": np.array([0.5, -0.25]), "b": np.array(1.0)}
SCRIPT = [{"w": np.array(g), "b": np.array(h)} for g, h in (([1.0, -2.0], 0.5), ([0.5, -1.0], 0.25), ([0.5, 1.0], 1.0))]


def answers_a_step(harness: Harness) -> None:
    """Gradients are asked for with the right names, shapes and dtypes, and parameters come back."""
    if not harness.talk(START, config()).step(SCRIPT).asked:
        raise Failure("step() asked for no gradient")


def starts_another(harness: Harness) -> None:
    """A session that nobody holds any more can be closed, and one begun after it answers."""
    harness.talks.clear()  # here the first one ends
    harness.latest = None
    answers_a_step(harness)


def lets_an_exception_through(harness: Harness) -> None:
    """What the gradient raises comes out of step(), parameters as they were."""
    harness.talk(START, config()).raising(SCRIPT, 0)


def saves_and_loads(harness: Harness) -> None:
    """What save() gives, load() takes in a fresh session."""
    talk = harness.talk(START, config())
    talk.step(SCRIPT)
    talk.resume(then=SCRIPT)
    talk.step(SCRIPT)


ADAPTER: tuple[tuple[str, str, Callable[[Harness], None]], ...] = (
    ("start, one step, params", "", answers_a_step),
    ("another session after it", "", starts_another),
    ("an exception comes out", "exceptions", lets_an_exception_through),
    ("save and load", "checkpoint", saves_and_loads),
)


def smoke(port: Port, dtypes: Sequence[str] | None, device: str, time_limit: float, loading: float) -> int:
    """Prints what works; the exit status: 0 all well, 1 the method is wrong. AdapterError where the adapter is broken,
    or the port hangs or dies. `dtypes`: all of them are asked; None for the first that the port declares."""
    trial = Trial(port, dtypes, device, time_limit=time_limit)
    began = time.perf_counter()
    wrong: list[str] = []
    for dtype in dict.fromkeys(dtypes or trial.verdict.dtypes[:1]):
        print(f"{trial.verdict.port} on {device}, {dtype}; loaded in {loading:.1f} s", flush=True)
        ask_the_adapter(trial.harnesses[dtype])
        wrong += [clause for clause in ask_the_method(trial.harnesses[dtype]) if clause not in wrong]
    words = f"the METHOD is wrong: {', '.join(wrong)}" if wrong else "adapter and method answer; run the whole suite"
    print(f"{words} ({time.perf_counter() - began:.2f} s)")
    return 1 if wrong else 0


def ask_the_adapter(harness: Harness) -> None:
    for what, needs, function in ADAPTER:
        if not needs or harness.capabilities[needs]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # what a port prints is no answer
                    function(harness)
            except Failure as failure:
                if failure.finding.timed_out:
                    raise hangs(what, failure, harness) from None
                raise AdapterError(f"the ADAPTER is broken ({what}): {failure}") from None
            print(f"adapter  ok    {what}", flush=True)


def ask_the_method(harness: Harness) -> list[str]:
    """The clauses that fail; AdapterError where the port hangs or dies in one, which says nothing of its numbers."""
    wrong, broke = [], []
    for number in METHOD:
        if not applies(clauses()[number], harness.capabilities):
            continue
        failure = attempt(number, harness)
        if failure and failure.finding.timed_out:
            raise hangs(number, failure, harness)
        verdict = "ok  " if failure is None else "DIED" if failure.finding.crash else "FAIL"
        print(f"method   {verdict}  {number}  {clauses()[number].rule}")
        if failure is None:
            continue
        print(f"               {failure}", flush=True)
        (broke if failure.finding.crash else wrong).append(number)
        if number == CALIBRATION:  # nothing else can be judged
            break
    if broke:
        also = f"; besides, the METHOD is wrong: {', '.join(wrong)}" if wrong else ""
        raise AdapterError(
            f"the port DIES, raises or sends what it should not in {', '.join(broke)}, in place of giving numbers, "
            f"right or wrong; look at its adapter first{also}"
        )
    return wrong


def hangs(where: str, failure: Failure, harness: Harness) -> AdapterError:
    """What to say of a port that does not come back, and where to look."""
    steps = harness.latest.steps if harness.latest else []
    asked = len(steps[-1].asked) if steps else 0
    if not steps:
        look = "no step had begun: look at the adapter"
    elif not asked:
        look = "this step had asked for no gradient: look at the adapter's step(), and at output that is not flushed"
    else:
        look = f"this step had asked for {asked} gradient{'s' * (asked > 1)}: look at what the port does after that"
    return AdapterError(f"the port HANGS ({where}): {failure}; {look} (--time-limit SECONDS gives it longer)")
