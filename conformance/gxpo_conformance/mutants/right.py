"""Right implementations that a careless suite would reject: each does something that the rules leave open.

`correct()` has them behind the two plain models.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, ModelPort
from gxpo_conformance.protocol import DTYPES, Arrays, Gradient


class NeutralAtMinusOne(Functional):
    """q = 1 at r = -1, whether K is odd or even."""

    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.where(np.abs(1 + r) <= 1e-8, self.kind(1), super().scale(r, K))


class AsksOnceMore(InPlace):
    """Has a plain step to fall back on, which asks for its own gradient, after a zero or a non-finite first one too."""

    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        self.asked = [*getattr(self, "asked", []), grad(self.handed_out(point))]
        loss, g = self.asked[-1]
        return super().ask(lambda _: (loss, g), point)

    def passes(self, grad: Gradient, before: tuple[Arrays, Any]) -> str:
        self.asked: list[tuple[float, Arrays]] = []
        outcome = super().passes(grad, before)
        if outcome == "single" and self.open() and self.first and self.nothing(self.first[1]):
            grad(before[0])
        return outcome

    def start_over(self) -> str:
        if self.again:
            self.again(self.handed_out(self.theta))
        return super().start_over()

    def outer(self, grad: Gradient) -> None:
        self.again = grad
        super().outer(grad)

    again: Gradient | None = None


class SmallIsZero(Functional):
    """Takes a norm below 1e-8 for zero, which nobody trains with."""

    def nothing(self, norm: float) -> bool:
        return norm < 1e-8


class LossesAlone(InPlace):
    """Looks whether losses are finite, not at gradients."""

    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return math.isfinite(loss)


class GradientsAlone(Functional):
    """Looks whether gradients are finite, not at losses."""

    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return math.isfinite(norm)


class OtherOrder(InPlace):
    """Gives its tensors in another order than it was given them."""

    def handed_out(self, point: Arrays) -> Arrays:
        return dict(reversed(super().handed_out(point).items()))

    def params(self) -> Arrays:
        return dict(sorted(super().params().items()))


class WideRatio(Functional):
    """Divides in float64, whatever it computes in otherwise."""

    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        r = after.astype(np.float64) / before.astype(np.float64)
        return np.clip(np.where(np.isfinite(r), r, 0), -2, 3)

    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return super().scale(r.astype(np.float64), K).astype(self.kind)


class OwnCorrections(Functional):
    """Computes AdamW's bias corrections, and what its decay leaves, in the run's own dtype."""

    def corrections(self, n: int, b1: float, b2: float) -> tuple[float, float]:
        one = self.kind(1)
        return float(one - self.kind(b1) ** self.kind(n)), float(one - self.kind(b2) ** self.kind(n))

    def kept(self, lr: float, decay: float) -> float:
        return float(self.kind(1) - self.kind(lr) * self.kind(decay))


class OneByOne(InPlace):
    """Adds up squares one by one, in the run's own dtype."""

    def norm(self, g: Arrays) -> float:
        return float(np.sqrt(self.added({k: v * v for k, v in g.items()})))

    def added(self, parts: Arrays) -> np.ndarray:
        total = np.zeros((), dtype=self.kind)
        for v in parts.values():
            total = np.add.accumulate(np.append(total, v.astype(self.kind)))[-1]
        return total

    def rms(self, before: np.ndarray) -> np.ndarray:
        return np.sqrt(self.added({"": before * before}) / self.kind(max(before.size, 1)))


class WithoutTheKeyword(Functional):
    """Written for the protocol's first version: `step` takes the gradient and nothing else."""

    def step(self, grad: Gradient) -> None:  # type: ignore[override]
        super().step(grad)


class RightPort(ModelPort):
    """`dtypes`: those that it declares; `about`: the clauses that are about what is odd in it; `declares`: what else it
    declares otherwise than everything."""

    def __init__(
        self, kind: type[Functional], name: str, dtypes: tuple[str, ...], *about: str, **declares: Any
    ) -> None:
        super().__init__(kind, f"model, {name}")
        self.dtypes, self.about, self.declares = dtypes, about, declares

    def capabilities(self) -> dict[str, Any]:
        declared = {**super().capabilities(), "dtypes": list(self.dtypes), **self.declares}
        return {key: value for key, value in declared.items() if value is not None}


def correct() -> list[RightPort]:
    """Both styles, with nothing odd; then the odd ones."""
    once = ("float32",)  # where rounding leaves least room, and a verdict has fewer random runs
    statistics = ["corrective_norm", "initial_norm", "disagreement", "never"]
    former = {"nonfinite_gradients": None, "nonfinite_losses": None, "nonfinite": True}
    return [
        *(RightPort(kind, kind.style, DTYPES) for kind in (Functional, InPlace)),
        RightPort(NeutralAtMinusOne, "neutral at r = -1", once, "EXT-05"),
        RightPort(AsksOnceMore, "asks for g0 once more", once, "NUM"),
        RightPort(SmallIsZero, "takes tiny gradients for zero", once, "NUM-01", "EST-01", "CKP-10", "INV-05"),
        RightPort(LossesAlone, "looks at losses alone", once, "NUM", nonfinite_gradients=False),
        RightPort(GradientsAlone, "looks at gradients alone", once, "NUM", nonfinite_losses=False),
        RightPort(Functional, "ema is its only baseline", once, "GAT", gate_baselines=["ema"]),
        RightPort(OtherOrder, "names in another order", once, "DEV", "CKP-04", "INV-07"),
        RightPort(WideRatio, "divides in float64", once, "EST", "EXT"),
        RightPort(OwnCorrections, "corrects AdamW in its own dtype", once, "OPT-03", "OPT-06"),
        RightPort(OneByOne, "adds up one by one", once, "EST-02", "CLP", "GAT-07"),
        RightPort(
            WithoutTheKeyword, "of the first protocol", once, "GAT-20", "GAT-21", gate_statistics=statistics, **former
        ),
    ]
