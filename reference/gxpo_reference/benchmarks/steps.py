"""Whole steps, against as many plain ones as they make backward passes."""

from __future__ import annotations

import math
from typing import Any

from gxpo_reference.benchmarks.contenders import ACTIVE, FALLBACK, PLAIN, contenders
from gxpo_reference.benchmarks.measure import Progress, summary, synchronizer, timed
from gxpo_reference.benchmarks.models import Problem

TURN = 0.05  # seconds that a turn lasts at least, by repeating it: clocks and schedulers have their grain


def measure(problem: Problem, device: str, rounds: int, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every contender's ratio to the plain steps beside it, over the rounds.

    A turn is a contender's step and its plain steps, one right after the other, and who begins changes from round to
    round: on a machine that others use, only neighbours in time can be compared.
    """
    sync, makers = synchronizer(device), contenders(problem)
    plain = makers.pop(PLAIN)()
    running = {name: make() for name, make in makers.items() if not names or name in names}
    plain.step()
    quick = timed(plain.step, sync)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for n in Progress("steps").rounds(rounds):
        for at, (name, contender) in enumerate(running.items()):
            repeat = max(1, math.ceil(TURN / (contender.plain_steps * quick)))
            turns = {
                "plain": lambda c=contender, r=repeat: timed(plain.step, sync, r * c.plain_steps) * c.plain_steps,
                "own": lambda c=contender, r=repeat: timed(c.step, sync, r),
            }
            order = ("plain", "own") if (n + at) % 2 else ("own", "plain")
            took = {}
            for who in order:
                problem.clear()  # what one leaves in .grad is no business of the next
                took[who] = turns[who]()
            if n:  # the first round warms up
                pairs[name].append((took["own"], took["plain"]))
    problem.clear()
    rows = {
        name: {
            "plain_steps": running[name].plain_steps,
            "seconds": summary([own for own, _ in taken]),
            "plain_seconds": summary([beside for _, beside in taken]),
            "ratio": summary([own / beside for own, beside in taken]),
        }
        for name, taken in pairs.items()
    }
    return {"problem": str(problem), "parameters": problem.size, "contenders": rows}


def table(result: dict[str, Any], device: str) -> list[tuple[str, ...]]:
    target = {ACTIVE: "1.05" if device == "cpu" else "1.02", FALLBACK: "1.01"}
    rows = [("", "ms a step", "against", "ratio", "quartiles", "target")]
    for name, row in result["contenders"].items():
        low, high = row["ratio"]["quartiles"]
        many = row["plain_steps"]
        rows.append(
            (
                name,
                f"{1e3 * row['seconds']['median']:.1f}",
                f"{many} plain step{'s' * (many > 1)}",
                f"{row['ratio']['median']:.3f}",
                f"{low:.3f} to {high:.3f}",
                target.get(name, ""),
            )
        )
    return rows
