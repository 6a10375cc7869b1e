"""A run as data: configuration, parameters, the answer to every gradient asked for, and what is right, by the oracle.

What a failing clause leaves behind for its port's author, and what the `step` vectors are; vectors/step.schema.json is
its form. The answers of a step are given in the order of the calls, whatever point was asked; a call after a non-finite
answer gets the first again, and so does one beyond the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gxpo_conformance.harness.budget import ALLOWED, Budget
from gxpo_conformance.harness.findings import PHASES, Boom, Failure, in_float64, require_close
from gxpo_conformance.harness.harness import Dialogue, Harness
from gxpo_conformance.harness.recorder import OWN, Recorder
from gxpo_conformance.protocol import Arrays
from gxpo_conformance.wire import from_wire, number, parse_number, to_wire
from gxpo_reference.oracle import Oracle, Trace

Case = dict[str, Any]
INTERRUPT = "KeyboardInterrupt"  # what an answer raises in place of the suite's own exception


def as_case(talk: Dialogue) -> Case:
    """What was said in `talk`, and what a right port would have asked and where it would have ended."""
    oracle, budget = Oracle(in_float64(talk.start), talk.config), Budget(talk.config, talk.harness.dtype)
    made: Case = {"dtype": talk.harness.dtype, "config": talk.config, "params": to_wire(talk.start), "steps": []}
    drift = {k: np.zeros(v.shape) for k, v in talk.start.items()}  # theta0 may be off by what earlier steps were
    for n, recorder in enumerate(talk.steps):
        step, drift = expected(recorder, oracle, budget, drift, talk.exact_ratio)
        made["steps"].append({"resume": True, **step} if n in talk.resumed_at else step)
    return made


def expected(
    recorder: Recorder, oracle: Oracle, budget: Budget, drift: Arrays, exact_ratio: bool
) -> tuple[dict[str, Any], Arrays]:
    """(one step of a case, how far off its end may be)."""
    answers: list[dict[str, Any]] = []
    replay = recorder.replay()
    handed_in = {} if recorder.statistic is None else {"statistic": number(recorder.statistic)}

    def answer(params: Arrays) -> tuple[float, Arrays]:
        if len(answers) == recorder.raise_at:
            interrupt = recorder.raise_what is KeyboardInterrupt
            answers.append({"raise": INTERRUPT if interrupt else OWN})
            raise Boom
        loss, grads = replay(params)
        answers.append({"loss": number(loss), "grads": to_wire(grads)})
        return loss, grads

    try:
        trace = oracle.step(answer, recorder.statistic)
    except Boom:
        end = {"end": to_wire(oracle.params), "end_tolerance": rounded(drift)}
        return {**handed_in, "answers": answers, "outcome": "raised", **end}, drift
    asked, end = budget.step(trace, exact_ratio)
    step: dict[str, Any] = {**handed_in, "answers": answers, "outcome": trace.outcome}
    if trace.why:
        step["why"] = trace.why
    step["asked"] = [to_wire(point) for point in trace.asked]
    step["tolerance"] = [rounded(add(b, drift)) for b in asked[: len(trace.asked)]]
    drift = add(end, drift)
    step["end"], step["end_tolerance"] = to_wire(oracle.params), rounded(drift)
    step["gate"] = scored(trace)
    return step, drift


def scored(trace: Trace) -> dict[str, Any]:
    """What the gate saw of a step. `h`: its observation, null where there was none; `z`: null where not scored."""
    z = None if trace.z is None else number(trace.z)
    h = None if trace.statistic is None else number(trace.statistic)
    return {"active": trace.outcome == "active", "h": h, "z": z, "streak": trace.streak, "trips": trace.tripped}


def add(one: Arrays, other: Arrays) -> Arrays:
    return {k: v + other[k] for k, v in one.items()}


def rounded(budget: Arrays) -> dict[str, Any]:
    """The tolerances, three digits of them."""
    return to_wire({k: np.array([float(f"{ALLOWED * v:.3g}") for v in b.ravel()]) for k, b in budget.items()})


def may_ask_again(step: dict[str, Any]) -> bool:
    """Whether one more call at theta0 is right, too: after a failed pass or a zero gradient."""
    return step["outcome"] in ("rolled back", "skipped") or step.get("why") == "zero gradient"


def replay(harness: Harness, case: Case) -> float:
    """Put `case` to a port: the largest share of a tolerance that any point took; Failure where one took more."""
    kind = np.float64 if harness.dtype == "float64" else np.float32
    talk, most = harness.talk(from_wire(case["params"]), case["config"]), 0.0

    def close(got: Arrays, want: dict, tolerance: dict, phase: str) -> None:
        nonlocal most
        budget = {k: np.array(t["data"]).reshape(got[k].shape) / ALLOWED for k, t in tolerance.items()}
        most = max(most, require_close(got, from_wire(want), budget, phase) / ALLOWED)

    for n, step in enumerate(case["steps"]):
        answers = [a for a in step["answers"] if "raise" not in a]
        script, losses = [from_wire(a["grads"], kind) for a in answers], [parse_number(a["loss"]) for a in answers]
        statistic = parse_number(step["statistic"]) if "statistic" in step else None
        try:
            if step.get("resume"):
                talk.resume(script or [from_wire(case["params"], kind)], statistic, losses)
            if step["outcome"] == "raised":
                what = KeyboardInterrupt if step["answers"][-1]["raise"] == INTERRUPT else Boom
                talk.raising(script, len(answers), statistic, what)
            else:
                seen = talk.step(script, losses, statistic).asked
                for got, want, tolerance, phase in zip(seen, step["asked"], step["tolerance"], PHASES, strict=False):
                    close(got, want, tolerance, phase)
                again = may_ask_again(step) and len(seen) == len(step["asked"]) + 1
                if len(seen) != len(step["asked"]) and not again:
                    text = f"{len(seen)} gradients asked, should be {len(step['asked'])}: {step['outcome']} step"
                    raise Failure(text, phase="gradients asked", got=len(seen), wanted=len(step["asked"]))
            close(talk.now, step["end"], step["end_tolerance"], "theta'")
        except Failure as failure:
            raise failure.within(f"step {n}", step=n) from failure.__cause__
    return most
