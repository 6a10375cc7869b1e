"""How far right implementations may differ: rounding, propagated to first order, never a chosen tolerance.

u is the unit roundoff of the run's dtype. Every stored parameter carries u of itself and an optimizer's update
`UPDATE[name]` u of its size, where size adds up the magnitudes of what the update is made of (a momentum buffer may
cancel to nothing and still carry the rounding of its parts), and 2 u more for every time the state had advanced. What
the ratio makes of that is found by asking q at r - dr and at r + dr, clamps included. ALLOWED times the result may be
used up.
`python -m gxpo_conformance.figures` prints what right ports need.
"""

from __future__ import annotations

import numpy as np

from gxpo_conformance.protocol import Arrays, Config
from gxpo_reference.oracle import Trace, extrapolation_scale

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
ALLOWED = 4.0
UPDATE = {"sgd": 4.0, "adamw": 16.0}  # roundings in one update, those of clipping included
Q_ROUNDINGS = 4.0  # and K / 2 more: q is a sum of about so many terms


class Budget:
    """Follows one session; `step` gives what each point of the next outer step may be off."""

    def __init__(self, config: Config, dtype: str) -> None:
        self.config, self.u = config, UNIT_ROUNDOFF[dtype]
        self.moment: Arrays = {}  # the momentum of the gradients' magnitudes
        self.advances = 0

    def step(self, trace: Trace, exact_ratio: bool = False, counts: bool = False) -> tuple[list[Arrays], Arrays]:
        """(one budget per point asked, budget of the end), coordinatewise; theta0 is taken as exactly known.

        `exact_ratio`: r is a quotient without rounding (g1 = -g0, say). `counts`: no point is going to be compared, and
        the costly part of it, theta~'s, may be left out.
        """
        points, asked = trace.points, [{k: np.zeros_like(v) for k, v in trace.points["theta0"].items()}]
        if trace.outcome == "skipped":
            return asked, asked[0]
        start, error, moment, advances = points["theta0"], asked[0], self.moment, self.advances
        if "theta1" in points:
            error1, moment1 = self.update(
                trace, 0, points["theta0"], points["theta1"], asked[0], moment, advances, "s1"
            )
            asked.append(error1)
        if "theta~" in points:
            error2, moment2 = self.update(
                trace, 1, points["theta1"], points["theta2"], error1, moment1, advances + 1, "s2"
            )
            asked.append(
                error2 if counts else {k: self.move(trace, k, error1[k], error2[k], exact_ratio) for k in error2}
            )
        if trace.outcome == "active":
            start, error = points["theta~"], asked[2]
            if self.config["optimizer_state"] == "keep":
                moment, advances = moment2, advances + 2
        last = len(trace.grads) - 1 if trace.outcome == "active" else 0
        end, self.moment = self.update(trace, last, start, points["theta'"], error, moment, advances, "s'")
        self.advances = advances + 1
        return asked, end

    def update(
        self,
        trace: Trace,
        i: int,
        here: Arrays,
        there: Arrays,
        error: Arrays,
        moment: Arrays,
        advances: int,
        label: str,
    ) -> tuple[Arrays, Arrays]:
        """(what `there` = U(here, c g_i) may be off, the moment after it)."""
        opt, after, budget = self.config["optimizer"], {}, {}
        c = trace.clips[i] if i < len(trace.clips) else 1.0
        entries = sum(g.size for g in trace.grads[i].values()) if c < 1 else 0  # summed one by one they round so often
        adamw = opt["name"] == "adamw"
        decay = opt["betas"][0] if adamw else opt["momentum"]
        stateful, corrections = 2.0 * (advances + 1) if decay else 0.0, 0.0
        for k, theta in here.items():
            g, before = np.abs(c * trace.grads[i][k]), moment.get(k, 0.0)
            if adamw:
                after[k] = decay * before + (1 - decay) * g
                state = trace.states[label]
                n, v = state["step"], state["exp_avg_sq"][k]
                size = after[k] / (1 - decay**n) / (np.sqrt(v / (1 - opt["betas"][1] ** n)) + opt["eps"])
                size = size + opt["weight_decay"] * np.abs(theta)
                corrections = self.corrections(n, opt["betas"])
            else:
                size = after[k] = decay * before + g + opt["weight_decay"] * np.abs(theta)
            roundings = (UPDATE[opt["name"]] + stateful + corrections + entries / 4) * opt["lr"] * size
            budget[k] = error[k] + self.u * (np.abs(theta) + np.abs(there[k]) + roundings)
        return budget, after

    @staticmethod
    def corrections(n: int, betas: list[float]) -> float:
        """Roundings of AdamW's bias corrections: where a beta is kept in the run's dtype, 1 - beta^n loses what beta
        lacks of 1. In float32 with 0.999 that is the largest of all."""
        lost = [b**n / (1 - b**n) for b in betas]
        return (n + 1) / 4 * (lost[0] + lost[1] / 2)  # the second stands under a root

    def move(self, trace: Trace, k: str, error1: np.ndarray, error2: np.ndarray, exact_ratio: bool) -> np.ndarray:
        """What theta~ may be off."""
        assert trace.q is not None  # theta~ was made with it
        theta0, tilde, q, u = trace.points["theta0"][k], trace.points["theta~"][k], trace.q[k], self.u
        distance = np.abs(trace.points["theta2"][k] - theta0)
        dq = (Q_ROUNDINGS + self.config["horizon"] / 2) * u * q + (
            0.0 if exact_ratio else self.spread(trace, k, error1, error2)
        )
        return u * (np.abs(tilde) + np.abs(theta0)) + self.config["alpha"] * (
            q * (error2 + u * distance) + dq * distance
        )

    def spread(self, trace: Trace, k: str, error1: np.ndarray, error2: np.ndarray) -> np.ndarray:
        """How far q may be off because r is."""
        assert trace.r is not None  # theta~ was made with all three
        assert trace.takes_part is not None
        assert trace.q is not None
        r, takes_part, q, theta, u = trace.r[k], trace.takes_part[k], trace.q[k], trace.points, self.u
        if self.config["estimator"] == "gradient":
            dr = 6.0 * u * np.abs(r)  # two clipped gradients, one division
        else:
            u0 = np.abs(theta["theta1"][k] - theta["theta0"][k])
            u1 = np.abs(theta["theta2"][k] - theta["theta1"][k])
            du0, du1 = error1 + u * u0, error1 + error2 + u * u1
            with np.errstate(divide="ignore", invalid="ignore"):
                if self.config["estimator"] == "tensor":
                    dr = (np.sum(u0 * du1 + u1 * du0) + 2 * np.abs(r) * np.sum(u0 * du0)) / np.sum(u0 * u0)
                    dr = dr + u * u0.size * np.abs(r)
                else:
                    dr = (du1 + np.abs(r) * du0) / u0
        dr = np.where(takes_part, np.nan_to_num(dr, nan=0.0), 0.0)
        around = [extrapolation_scale(np.clip(r + d, -2.0, 3.0), self.config["horizon"]) for d in (-dr, dr)]
        widest = np.maximum(np.abs(around[0] - q), np.abs(around[1] - q))
        return np.where(takes_part, widest, 0.0)
