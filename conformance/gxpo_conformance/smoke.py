"""A few questions that tell a broken adapter from a broken method, before the whole suite does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import AdapterError, Port, config
from gxpo_conformance.trial import Trial, applies, attempt

METHOD = ("OPT-01", "CST-01", "EXT-01", "MOV-01", "COR-01", "GAT-01", "GAT-08")
SCRIPT = [{"w": np.array(g), "b": np.array(h)} for g, h in (([1.0, -2.0], 0.5), ([0.5, -1.0], 0.25), ([0.5, 1.0], 1.0))]


def answers_a_step(harness: Harness) -> None:
    """Gradients are asked for with the right names, shapes and dtypes, and parameters come back."""
    if not harness.talk({"w": np.array([0.5, -0.25]), "b": np.array(1.0)}, config()).step(SCRIPT).asked:
        raise Failure("step() asked for no gradient")


def lets_an_exception_through(harness: Harness) -> None:
    """What the gradient raises comes out of step(), parameters as they were."""
    harness.talk({"w": np.zeros(2), "b": np.array(1.0)}, config()).raising(SCRIPT, 0)


def saves_and_loads(harness: Harness) -> None:
    """What save() gives, load() takes in a fresh session."""
    talk = harness.talk({"w": np.zeros(2), "b": np.array(1.0)}, config())
    talk.step(SCRIPT)
    talk.resume(then=SCRIPT)
    talk.step(SCRIPT)


ADAPTER: tuple[tuple[str, str, Callable[[Harness], None]], ...] = (
    ("start, one step, params", "", answers_a_step),
    ("an exception comes out", "exceptions", lets_an_exception_through),
    ("save and load", "checkpoint", saves_and_loads),
)


def smoke(port: Port, dtypes: Sequence[str] | None, device: str, time_limit: float, loading: float) -> int:
    """Prints what works; the exit status: 0 all well, 1 the method is wrong, 2 the adapter is broken."""
    trial = Trial(port, dtypes, device, time_limit=time_limit)
    harness = next(iter(trial.harnesses.values()))
    print(f"{trial.verdict.port} on {device}, {harness.dtype}; loaded in {loading:.1f} s")
    began = time.perf_counter()
    for what, needs, function in ADAPTER:
        if not needs or harness.capabilities[needs]:
            try:
                function(harness)
            except Failure as failure:
                raise AdapterError(f"the ADAPTER is broken ({what}): {failure}") from None
            print(f"adapter  ok    {what}")
    wrong = []
    for number in METHOD:
        if applies(clauses()[number], harness.capabilities):
            failure = attempt(number, harness)
            print(f"method   {'FAIL' if failure else 'ok  '}  {number}  {clauses()[number].rule}")
            if failure:
                wrong.append(number)
                print(f"               {failure}")
                if number == "OPT-01":  # nothing else can be judged
                    break
    words = f"the METHOD is wrong: {', '.join(wrong)}" if wrong else "adapter and method answer; run the whole suite"
    print(f"{words} ({time.perf_counter() - began:.2f} s)")
    return 1 if wrong else 0
