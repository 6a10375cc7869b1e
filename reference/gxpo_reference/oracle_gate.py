"""When the oracle falls back: is this step active, and what does one more observation change?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Gate:
    """All that the gate remembers."""

    count: int = 0  # observations made
    recent: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the window baseline: the latest, oldest first
    mu: float = 1.0  # of the ema baseline
    var: float = 1.0  # of the ema baseline; its floor applies where sigma is read, not here
    streak: int = 0  # surprising observations in a row
    pin: np.ndarray | None = None  # (mu, sigma) that scored the open streak's first member
    closed_at: int | None = None  # the step that tripped last
    completed: int = 0  # active steps completed, for the budget


NO_GATE = {"statistic": "never", "cooldown": None, "max_active_steps": None}


def why_closed(gate: Gate, rules: dict, step: int) -> str:
    """Why this step is a single pass; "" when it is active."""
    budget, cooldown = rules["max_active_steps"], rules["cooldown"]
    if budget is not None and gate.completed >= budget:  # for good, cooldown or not
        return f"budget of {budget} active steps spent"
    if gate.closed_at is not None and (cooldown is None or step < gate.closed_at + 1 + cooldown):
        return f"gate closed at step {gate.closed_at}"
    return ""


@np.errstate(all="ignore")
def observe(gate: Gate, rules: dict, step: int, h: float) -> tuple[Gate, dict]:
    """Score h against what preceded it, then take it in: the new gate, and the Trace fields that tell of it."""
    ema = rules["baseline"] == "ema"
    baseline = None  # no score, no trip
    if gate.pin is not None:  # a baseline that has seen the streak's first member finds the next ones ordinary
        baseline = (float(gate.pin[0]), float(gate.pin[1]))
    elif ema and gate.count >= 2:  # a cold start at (1, 1) would find almost any real norm a surprise
        baseline = (gate.mu, max(math.sqrt(gate.var), 0.01))
    elif not ema and len(gate.recent) == rules["window"]:  # without h: with it no score could be above sqrt(w - 1)
        baseline = (float(np.mean(gate.recent)), float(np.std(gate.recent)))

    z, streak = None, 0
    if baseline is not None:
        z = (h - baseline[0]) / (baseline[1] + 1e-9)
        if (abs(z) if rules["two_sided"] else z) >= rules["threshold"]:
            streak = gate.streak + 1

    tripped = streak >= rules["patience"]

    recent, mu, var = gate.recent, gate.mu, gate.var
    if ema:
        omega, d = rules["omega"], h - gate.mu  # the old mu in both
        mu, var = (1 - omega) * mu + omega * h, (1 - omega) * var + omega * d * d
    else:
        recent = np.append(recent, h)[-rules["window"] :]
    fields = {"statistic": h, "baseline": baseline, "z": z, "streak": streak, "tripped": tripped}
    if tripped:  # what follows, after a cooldown, starts a streak of its own
        gate, streak = replace(gate, closed_at=step), 0
    pin = np.array(baseline) if streak else None
    return replace(gate, count=gate.count + 1, recent=recent, mu=mu, var=var, streak=streak, pin=pin), fields
