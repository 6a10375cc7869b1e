"""The gate of the model: what is observed, what scores it, when it trips, what is counted. A part of `Functional`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gxpo_conformance.protocol import Arrays

Usual = tuple[float, float] | None  # (mu, sigma) that h is scored by; None: there is nothing to score it by yet


class ModelGate:
    """Reads and writes `gate`, by `rules`, the configuration's."""

    rules: dict[str, Any]
    gate: dict[str, Any]
    supplied: float | None  # the number that came with the step

    def new_gate(self) -> dict[str, Any]:
        return {
            "step": 0, "active": 0, "closed_at": None, "streak": 0, "pin": None, "seen": 0, "history": [],
            "mean": 1.0, "var": 1.0,
        }  # fmt: skip

    def open(self) -> bool:
        """Whether the next step is an active one."""
        return not self.spent() and (self.gate["closed_at"] is None or self.cooled())

    def spent(self) -> bool:
        most = self.rules["max_active_steps"]
        return most is not None and self.gate["active"] >= most

    def cooled(self) -> bool:
        n = self.rules["cooldown"]
        return n is not None and self.gate["step"] >= self.gate["closed_at"] + 1 + n

    def watching(self) -> bool:
        return self.rules["statistic"] != "never" and self.gate["step"] >= self.rules["warmup"]

    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        kind = self.rules["statistic"]
        if kind == "supplied":
            return self.supplied or 0.0
        if kind == "disagreement":
            return 1 - abs(self.cosine(g[0], g[2], norms[0] * norms[2]))
        return norms[0] if kind == "initial_norm" else norms[2]

    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        return float(sum(np.sum(a[k] * b[k]) for k in a)) / sizes if sizes else 0.0

    def usual(self) -> Usual:
        """(mu, sigma) that h is scored by."""
        return self.gate["pin"] or (self.ema() if self.rules["baseline"] == "ema" else self.window())

    def ema(self) -> Usual:
        return (self.gate["mean"], max(math.sqrt(self.gate["var"]), 0.01)) if self.gate["seen"] >= 2 else None

    def window(self) -> Usual:
        past = self.gate["history"][-self.rules["window"] :]
        return (float(np.mean(past)), float(np.std(past))) if len(past) == self.rules["window"] else None

    def score(self, h: float, usual: Usual) -> float | None:
        return None if usual is None else (h - usual[0]) / (usual[1] + 1e-9)

    def surprising(self, z: float | None) -> bool:
        return z is not None and (abs(z) if self.rules["two_sided"] else z) >= self.rules["threshold"]

    def observe(self, h: float) -> None:
        gate = self.gate
        usual = self.usual()
        if usual is not None and self.surprising(self.score(h, usual)):
            gate["streak"], gate["pin"] = gate["streak"] + 1, self.pinned(usual)
        else:
            self.calm()
        if gate["streak"] >= self.rules["patience"]:
            self.trip()
        self.remember(h)

    def pinned(self, usual: tuple[float, float]) -> Usual:
        return usual

    def calm(self) -> None:
        self.gate["streak"], self.gate["pin"] = 0, None

    def trip(self) -> None:
        self.gate["closed_at"] = self.gate["step"]
        self.calm()

    def remember(self, h: float) -> None:
        gate, omega = self.gate, self.rules["omega"]
        gate["history"], gate["seen"] = [*gate["history"], h], gate["seen"] + 1
        off = h - gate["mean"]
        gate["mean"], gate["var"] = (
            (1 - omega) * gate["mean"] + omega * h,
            (1 - omega) * gate["var"] + omega * off * off,
        )

    def counted(self, outcome: str) -> None:
        """A step is over: "active", "single", "rolled back" or "skipped"."""
        self.gate["active"] += outcome == "active"
        self.gate["step"] += 1
