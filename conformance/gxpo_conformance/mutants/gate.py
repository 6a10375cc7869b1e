"""Mistakes in the gate itself: when it trips, what it watches, what it scores by."""

from __future__ import annotations

import math

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.mutants.model_gate import Usual
from gxpo_conformance.protocol import Arrays, Gradient


@mutant("never-trips", "never falls back", "GAT-01", "GAT-02", "GAT-13", "TOY-01", "TOY-02", "TOY-03")
class NeverTrips(Functional):
    def trip(self) -> None:
        self.calm()


@mutant("one-step-late", "makes one more active step after the trip", "GAT-01")
class OneStepLate(Functional):
    def open(self) -> bool:
        return super().open() or (self.gate["closed_at"] == self.gate["step"] - 1 and not self.spent())


@mutant("opens-again", "opens the gate when the norm is calm again", "GAT-01")
class OpensAgain(InPlace):
    def counted(self, outcome: str) -> None:
        if outcome == "single" and self.gate["closed_at"] is not None and self.rules["cooldown"] is None:
            self.gate["closed_at"] = None
        super().counted(outcome)


@mutant("undoes-the-tripping-step", "turns the step that trips into a single pass", "GAT-01")
class UndoesTheTrippingStep(InPlace):
    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        outcome = super().passes(grad, before)
        if outcome == "active" and self.gate["closed_at"] == self.gate["step"]:
            self.roll_back(before)
            self.advance(self.clip(*self.ask(grad, self.theta)))
        return outcome


@mutant(
    "window-holds-its-own-value",
    "scores a value against a window that contains it",
    "GAT-02",
    source="released SFPO code",
)
class WindowHoldsItsOwnValue(Functional):
    def observe(self, h: float) -> None:
        gate, before = self.gate, self.gate["history"]
        full = len(before) >= self.rules["window"]
        gate["history"] = [*before, h] if full else before
        usual, gate["history"] = self.usual(), before
        gate["pin"], pin = (usual if self.rules["baseline"] == "window" else gate["pin"]), gate["pin"]
        if usual is None or self.rules["baseline"] == "ema":
            gate["pin"] = pin
        super().observe(h)


@mutant("sample-deviation", "divides by w - 1", "GAT-03")
class SampleDeviation(Functional):
    def window(self) -> Usual:
        found = super().window()
        n = self.rules["window"]
        return found and (found[0], found[1] * math.sqrt(n / (n - 1)))


@mutant("mean-absolute-deviation", "takes the mean absolute deviation for sigma", "GAT-03")
class MeanAbsoluteDeviation(InPlace):
    def window(self) -> Usual:
        found = super().window()
        past = self.gate["history"][-self.rules["window"] :]
        return found and (found[0], float(np.mean(np.abs(np.array(past) - found[0]))))


@mutant("ratio-to-the-mean", "compares h / mu with the threshold", "GAT-03")
class RatioToTheMean(Functional):
    def score(self, h: float, usual: Usual) -> float | None:
        return None if usual is None else h / usual[0]


@mutant("threshold-of-one", "trips one deviation above the mean, whatever the threshold", "GAT-01", "GAT-03")
class ThresholdOfOne(InPlace):
    def surprising(self, z: float | None) -> bool:
        return z is not None and (abs(z) if self.rules["two_sided"] else z) >= 1


@mutant("unfilled-window-scores", "scores as soon as there is an observation", "GAT-04")
class UnfilledWindowScores(Functional):
    def window(self) -> Usual:
        past = self.gate["history"][-self.rules["window"] :]
        return (float(np.mean(past)), float(np.std(past))) if past else None


@mutant("window-one-short", "scores when the window lacks one observation", "GAT-04")
class WindowOneShort(InPlace):
    def window(self) -> Usual:
        past = self.gate["history"][-self.rules["window"] :]
        return (float(np.mean(past)), float(np.std(past))) if len(past) >= self.rules["window"] - 1 else None


@mutant("always-two-sided", "lets an unusually low value trip", "GAT-05", source="the method's first form")
class AlwaysTwoSided(Functional):
    def surprising(self, z: float | None) -> bool:
        return z is not None and abs(z) >= self.rules["threshold"]


@mutant("never-two-sided", "ignores two_sided", "GAT-13")
class NeverTwoSided(InPlace):
    def surprising(self, z: float | None) -> bool:
        return z is not None and z >= self.rules["threshold"]


@mutant("low-values-only", "takes two_sided for the other side alone", "GAT-13")
class LowValuesOnly(Functional):
    def surprising(self, z: float | None) -> bool:
        return z is not None and (-z if self.rules["two_sided"] else z) >= self.rules["threshold"]


@mutant("whole-history", "scores by all that it has seen, not by the latest w", "GAT-06")
class WholeHistory(Functional):
    def window(self) -> Usual:
        past = self.gate["history"]
        return (float(np.mean(past)), float(np.std(past))) if len(past) >= self.rules["window"] else None


@mutant("first-window-for-good", "scores by the first full window for ever", "GAT-06")
class FirstWindowForGood(InPlace):
    def window(self) -> Usual:
        past = self.gate["history"][: self.rules["window"]]
        return (float(np.mean(past)), float(np.std(past))) if len(past) == self.rules["window"] else None


@mutant("watches-g0", "watches |g0| whatever statistic is asked for", "GAT-07", "GAT-21")
class WatchesG0(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return norms[0]


@mutant("watches-g1", "watches the second gradient", "GAT-07")
class WatchesG1(InPlace):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return norms[1] if self.rules["statistic"] == "corrective_norm" else super().statistic(g, norms)


@mutant("watches-g-tilde-only", "watches |g~| whatever statistic is asked for", "GAT-20", "GAT-21")
class WatchesCorrectiveOnly(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return norms[2]


@mutant("watches-the-sum-of-norms", "adds the tensors' norms up", "GAT-07")
class WatchesTheSumOfNorms(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return super().statistic(g, [sum(self.norm({k: v}) for k, v in a.items()) for a in g])


@mutant("watches-the-largest-norm", "watches the largest tensor's norm", "GAT-07")
class WatchesTheLargestNorm(InPlace):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        norms = [max(self.norm({k: v}) for k, v in a.items()) for a in g]
        return super().statistic(g, norms)


@mutant(
    "disagreement-signed", "takes 1 - cos in place of 1 - |cos|", "GAT-21", source="a misreading found in this project"
)
class DisagreementSigned(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        if self.rules["statistic"] != "disagreement":
            return super().statistic(g, norms)
        return 1 - self.cosine(g[0], g[2], norms[0] * norms[2])


@mutant("zero-agrees", "takes the cosine with a zero gradient for 1", "GAT-21")
class ZeroAgrees(InPlace):
    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        return super().cosine(a, b, sizes) if sizes else 1.0


@mutant("agreement", "watches |cos| in place of 1 - |cos|", "GAT-21")
class Agreement(InPlace):
    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        return 1 - abs(super().cosine(a, b, sizes))


@mutant("never-still-observes", "lets the statistic never watch the corrective norm", "GAT-22")
class NeverStillObserves(Functional):
    def watching(self) -> bool:
        return self.gate["step"] >= self.rules["warmup"]


@mutant("constant-history-trips", "trips on any value after a constant history", "GAT-09")
class ConstantHistoryTrips(Functional):
    def surprising(self, z: float | None) -> bool:
        usual = self.usual()
        return super().surprising(z) or (usual is not None and usual[1] == 0)


@mutant("constant-history-ignored", "does not score where the deviation is 0", "GAT-09")
class ConstantHistoryIgnored(InPlace):
    def score(self, h: float, usual: Usual) -> float | None:
        return None if usual is None or usual[1] == 0 else super().score(h, usual)


@mutant("deviation-floored", "puts a floor of 1 under the window's deviation", "GAT-09", "GAT-03")
class DeviationFloored(Functional):
    def window(self) -> Usual:
        found = super().window()
        return found and (found[0], max(found[1], 1.0))
