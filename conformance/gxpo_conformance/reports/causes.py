"""What the failures of a run have in common: ten clauses that fail by one mistake are one thing to mend.

A cause is a known mistake that accounts for its clauses; or the port's last words before it crashed; or what failures
of one sort have in common (float32 in a float64 run, a request too many after a failed pass, the point that is the
first to differ), which need not be one mistake. A clause that fails in several dtypes has one cause, and what was
blocked by a clause belongs to that clause's cause.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gxpo_conformance.clauses.table import CHECKS
from gxpo_conformance.harness.findings import Finding
from gxpo_conformance.harness.recorder import Recorder
from gxpo_conformance.trial import BLOCKED, FAIL, PASS, Result, Verdict

Record = dict[str, Any]
Key = tuple[str, ...]

# The first point that differs, and what of a step lies before it.
PARTS = {
    "theta0": "theta0, the first point asked, is the first that differs: where a step begins",
    "theta1": "theta1, the second point asked, is the first that differs: the optimizer's update, or what it is given",
    "theta~": "theta~, the third point asked, is the first that differs: ratio, virtual point or partial move",
    "theta'": "theta', the end of the step, is the first that differs: the last update and the state it starts from",
}
STRENGTH = ("mistake", "crash", "time", "float32", "hint", "point", "clause")  # how much a key says, the most first

FLOAT32 = "off by what float32 rounds: float32, or a constant kept in float32, is used somewhere in a float64 run"
ACTIVE, SINGLE = "an active step where a single pass is right", "a single pass where an active step is right"
ROUNDED = (2.0**-45, 2.0**-22)  # of the number itself: beyond float64's rounding, within a few of float32's
BUDGETS = (1e5, 1e9)  # of float64's rounding budgets
MOST_CLAUSES = 12  # named on a line


# ---- What a single failure says --------------------------------------------------------------------------------------


def single_precision(verdict: Verdict) -> set[str]:
    """Clauses that fail in float64 by about what float32 rounds. None unless all that fail there by a number do, and
    none fails in float32: a wrong constant of 1e-8 is off by as little in most clauses, but not in all."""
    failed = [r for r in verdict.every() if r.verdict == FAIL and r.finding]
    numbers = {r.clause.id: r.finding for r in failed if r.finding and r.finding.budgets is not None}
    if any(r.dtype != "float64" for r in failed) or 2 * len(numbers) < len(failed):
        return set()
    fine = {r.clause.id for r in verdict.every() if r.dtype == "float32" and r.verdict == PASS}
    return set(numbers) if all(about_float32(finding, c in fine) for c, finding in numbers.items()) else set()


def about_float32(finding: Finding, fine: bool) -> bool:
    """`fine`: the clause passes in float32."""
    if finding.got is None or finding.wanted is None or finding.budgets is None:
        return False
    size = max(abs(finding.got), abs(finding.wanted))
    off = abs(finding.got - finding.wanted)
    rounded = ROUNDED[0] * size < off <= ROUNDED[1] * size
    return rounded or (fine and BUDGETS[0] <= finding.budgets <= BUDGETS[1])


def hint(result: Result) -> str | None:
    """A count of gradients that is wrong, in words; None where that is not it."""
    finding = result.finding
    if finding is None:
        return None
    steps = result.talk.steps if result.talk else []
    at = finding.step if finding.step is not None else len(steps) - 1
    odd = failed_pass(steps[at]) if 0 <= at < len(steps) else None
    if odd and "theta0, asked again," in finding.text:  # one more is right there, but only of theta0
        return counted(1, 0, odd)
    if finding.phase != "gradients asked" or finding.got is None or finding.wanted is None:
        return None
    return counted(int(finding.got), int(finding.wanted), odd)


def failed_pass(step: Recorder) -> str | None:
    """What the step was given that no further point follows from."""
    for loss, grads in step.given:
        if not np.isfinite(loss):
            return "a non-finite loss"
        if not all(np.isfinite(g).all() for g in grads.values()):
            return "a non-finite gradient"
    if step.given and not any(np.any(g) for g in step.given[0][1].values()):
        return "a zero gradient"
    return None


def counted(got: int, wanted: int, odd: str | None) -> str:
    if odd and got > wanted:
        times = {1: "once", 2: "twice"}.get(got - wanted, f"{got - wanted} times")
        return f"asked {times} more after {odd}: no further point is asked for then, at most the first once more"
    if got == 0:
        return "asks for no gradient"
    if wanted == 1:
        return ACTIVE if got >= 3 else "a second gradient in a single pass"
    if wanted >= 2 and got == 1:  # 2: an active step whose second pass fails
        return SINGLE
    if wanted == 3 and got == 2:
        return "stops after the second gradient, where an active step takes three"
    if got > wanted:
        return f"asks for more gradients than the {wanted} of such a step"
    return f"asks for fewer gradients than the {wanted} of such a step"


# ---- What several have in common -------------------------------------------------------------------------------------


def causes(results: list[Record]) -> list[Record]:
    """What failed, by cause, the one of the most clauses first; numbers them in the results, from 1, as "cause"."""
    failed = [r for r in results if r["verdict"] == FAIL]
    keys = {(r["clause"], r["dtype"]): key(r) for r in failed}
    strongest: dict[str, Key] = {}
    for (clause, _), found in keys.items():
        strongest[clause] = min(strongest.get(clause, found), found, key=lambda k: STRENGTH.index(k[0]))
    groups: dict[Key, list[Record]] = {}
    for r in failed:
        own = keys[r["clause"], r["dtype"]]
        groups.setdefault(own if own[0] in ("mistake", "crash", "time") else strongest[r["clause"]], []).append(r)
    made = [cause(found, some) for found, some in groups.items()]
    order = sorted(range(len(made)), key=lambda n: -len(made[n]["clauses"]))
    for number, n in enumerate(order, 1):
        for r in list(groups.values())[n]:
            r["cause"] = number
    made = [made[n] for n in order]
    spread(results, made)
    return made


def key(r: Record) -> Key:
    """Failures with the same key have the same cause."""
    finding = r.get("finding", {})
    if "candidates" in r:
        return ("mistake", *(m["id"] for m in r["candidates"]))
    if finding.get("timed_out"):
        return ("time",)
    if finding.get("crash"):
        return ("crash", last_words(r["message"]))
    if said := r.get("hint"):
        return ("float32",) if said == FLOAT32 else ("hint", sort(said))
    if finding.get("phase") in PARTS:
        return ("point", finding["phase"])
    return ("clause", r["clause"])


def sort(said: str) -> str:
    """What hints of one sort share: how often is asked after a failed pass, and which way the gate errs, is no sort."""
    if said in (ACTIVE, SINGLE):
        return "gate"
    return said.partition(" more after ")[2] or said


def last_words(message: str) -> str:
    """Of a crash, without the step that it was in."""
    lines = message.strip().splitlines() or [""]
    return lines[-1].partition(": ")[2] if lines[-1].startswith("step ") else lines[-1]


def cause(found: Key, results: list[Record]) -> Record:
    first, kind = results[0], found[0]
    clauses = list(dict.fromkeys(r["clause"] for r in results))
    nearest = next((r["candidates"] for r in results if "candidates" in r), [])
    if kind == "mistake":
        what = names(nearest)
    elif kind == "time":
        what = "does not answer in time"
    elif kind == "crash":
        what = f"crashes: {found[1]}"
    elif len(clauses) == 1 and kind == "point":
        what = first["message"]
    elif kind == "point":
        what = PARTS[found[1]]
    elif kind == "clause":
        what = first["message"]
    else:
        said = list(dict.fromkeys(r["hint"] for r in results if "hint" in r))
        what = f"{ACTIVE}, and the other way round" if {ACTIVE, SINGLE} <= {*said} else said[0]
    return {
        "what": what,
        "clauses": clauses,
        "dtypes": list(dict.fromkeys(r["dtype"] for r in results)),
        "nearest": nearest,
        "hint": next((r["hint"] for r in results if r.get("hint")), None),
        "blocked": [],
    }


def spread(results: list[Record], made: list[Record]) -> None:
    """Give every blocked result the cause of what it leans on, and say so there."""
    of = {(r["clause"], r["dtype"]): r["cause"] for r in results if "cause" in r}
    blocked = [r for r in results if r["verdict"] == BLOCKED]
    late = next((n for n, c in enumerate(made, 1) if c["what"] == "does not answer in time"), None)
    for _ in range(len(blocked)):  # as often as one leans on another
        before = len(of)
        for r in blocked:
            by = [of[lean, r["dtype"]] for lean in CHECKS[r["clause"]].leans if (lean, r["dtype"]) in of]
            if late and "ran out of time" in r["message"]:
                by = [late]
            if by:
                of[r["clause"], r["dtype"]] = r["cause"] = by[0]
        if len(of) == before:
            break
    for number, found in enumerate(made, 1):
        found["blocked"] = list(dict.fromkeys(r["clause"] for r in blocked if r.get("cause") == number))


# ---- In words --------------------------------------------------------------------------------------------------------


def headline(made: list[Record]) -> str:
    return "" if not made else f"{len(made)} {'cause' if len(made) == 1 else 'causes'}"


def told(found: Record) -> str:
    """One cause on a line: what, and which clauses."""
    clauses = found["clauses"]
    named = ", ".join(clauses[:MOST_CLAUSES]) + (", ..." if len(clauses) > MOST_CLAUSES else "")
    many = f"{len(clauses)} {'clause' if len(clauses) == 1 else 'clauses'}: {named}"
    blocked = f"; {len(found['blocked'])} more blocked" if found["blocked"] else ""
    also = f"; {found['hint']}" if found["hint"] and found["hint"] not in found["what"] else ""
    return f"{found['what']}{also} ({many}{blocked})"


def names(candidates: list[Record]) -> str:
    return f"{candidates[0]['how']}: " + "; or ".join(f"{m['does']} ({m['id']})" for m in candidates)


def explained(r: Record) -> list[str]:
    """What a failure looks like, in lines."""
    return [*([names(r["candidates"])] if "candidates" in r else []), *([r["hint"]] if "hint" in r else [])]
