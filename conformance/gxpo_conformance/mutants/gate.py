"""Mistakes in the gate."""

from __future__ import annotations

import math

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Gradient

Usual = tuple[float, float] | None


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


@mutant("patience-ignored", "trips at the first surprise", "GAT-10", "GAT-11", "GAT-12")
class PatienceIgnored(Functional):
    def observe(self, h: float) -> None:
        if self.surprising(self.score(h, self.usual())):
            self.gate["streak"] = self.rules["patience"] - 1
        super().observe(h)


@mutant("patience-in-all", "counts surprises without asking that they follow one another", "GAT-10")
class PatienceInAll(InPlace):
    def calm(self) -> None:
        self.gate["pin"] = None

    def trip(self) -> None:
        super().trip()
        self.gate["streak"] = 0


@mutant("patience-one-more", "waits for one surprise more than patience", "GAT-10", "GAT-01")
class PatienceOneMore(Functional):
    def trip(self) -> None:
        if self.gate["streak"] > self.rules["patience"]:
            super().trip()


@mutant("baseline-not-pinned", "scores an open streak by a baseline that has seen its members", "GAT-11", "GAT-23")
class BaselineNotPinned(Functional):
    def pinned(self, usual: tuple[float, float]) -> None:
        return None


@mutant("pin-kept-for-good", "never lets go of the first streak's baseline", "GAT-12")
class PinKeptForGood(InPlace):
    def calm(self) -> None:
        self.gate["streak"] = 0


@mutant("history-stops-under-a-streak", "leaves surprising values out of the history", "GAT-12")
class HistoryStopsUnderAStreak(Functional):
    def remember(self, h: float) -> None:
        if not self.gate["streak"]:
            super().remember(h)


@mutant("ema-not-pinned", "pins the window's baseline but not the ema", "GAT-23")
class EmaNotPinned(InPlace):
    def pinned(self, usual: tuple[float, float]) -> Usual:
        return None if self.rules["baseline"] == "ema" else usual


@mutant("warmup-observes", "lets warm-up steps into the history", "GAT-14")
class WarmupObserves(Functional):
    def watching(self) -> bool:
        if self.gate["step"] < self.rules["warmup"]:
            self.warming = True
        return self.rules["statistic"] != "never"

    def trip(self) -> None:
        if self.gate["step"] >= self.rules["warmup"]:
            super().trip()


@mutant("warmup-single", "makes single passes while it warms up", "GAT-14")
class WarmupSingle(InPlace):
    def open(self) -> bool:
        return super().open() and self.gate["step"] >= self.rules["warmup"]


@mutant("warmup-one-short", "ends the warm-up a step early", "GAT-14")
class WarmupOneShort(Functional):
    def watching(self) -> bool:
        return self.rules["statistic"] != "never" and self.gate["step"] >= self.rules["warmup"] - 1


@mutant("warmup-ignored", "ignores warmup", "GAT-14")
class WarmupIgnored(InPlace):
    def watching(self) -> bool:
        return self.rules["statistic"] != "never"


@mutant("cooldown-ignored", "ignores cooldown: closed is closed", "GAT-15", "GAT-16")
class CooldownIgnored(Functional):
    def cooled(self) -> bool:
        return False


@mutant("cooldown-one-short", "opens a step early", "GAT-15", "CKP-07")
class CooldownOneShort(InPlace):
    def cooled(self) -> bool:
        n = self.rules["cooldown"]
        return (
            n is not None
            and self.gate["step"] >= self.gate["closed_at"] + n
            and self.gate["step"] > self.gate["closed_at"] + 1
        )


@mutant("cooldown-one-long", "opens a step late", "GAT-15", "CKP-07")
class CooldownOneLong(Functional):
    def cooled(self) -> bool:
        n = self.rules["cooldown"]
        return n is not None and self.gate["step"] > self.gate["closed_at"] + 1 + n


@mutant("cooldown-clears-the-baseline", "starts the history anew after a cooldown", "GAT-16")
class CooldownClearsTheBaseline(Functional):
    def trip(self) -> None:
        super().trip()
        self.clear = True

    def remember(self, h: float) -> None:
        super().remember(h)
        if getattr(self, "clear", False):
            self.gate["history"], self.clear = [], False


@mutant("single-passes-observe", "lets the norms of single passes into the history", "GAT-16")
class SinglePassesObserve(InPlace):
    def counted(self, outcome: str) -> None:
        if outcome == "single" and self.first is not None:
            self.remember(self.first[1])
        super().counted(outcome)


@mutant("streak-outlives-the-cooldown", "keeps the streak over a cooldown", "GAT-24")
class StreakOutlivesTheCooldown(Functional):
    def trip(self) -> None:
        self.gate["closed_at"] = self.gate["step"]


@mutant("budget-ignored", "ignores max_active_steps", "GAT-17", "GAT-25", "CKP-05")
class BudgetIgnored(Functional):
    def spent(self) -> bool:
        return False


@mutant("budget-one-more", "spends one active step more than the budget", "GAT-17", "GAT-25", "CKP-05")
class BudgetOneMore(InPlace):
    def spent(self) -> bool:
        most = self.rules["max_active_steps"]
        return most is not None and self.gate["active"] > most


@mutant("budget-counts-observations", "counts observations towards the budget, not active steps", "GAT-17")
class BudgetCountsObservations(Functional):
    def spent(self) -> bool:
        most = self.rules["max_active_steps"]
        return most is not None and self.gate["seen"] >= most


@mutant("budget-counts-every-step", "counts single passes towards the budget", "GAT-25")
class BudgetCountsEveryStep(Functional):
    def spent(self) -> bool:
        most = self.rules["max_active_steps"]
        return most is not None and self.gate["step"] >= most


@mutant("budget-reopens", "lets a cooldown open a gate whose budget is spent", "GAT-25")
class BudgetReopens(InPlace):
    def spent(self) -> bool:
        return super().spent() and self.gate["closed_at"] is None


@mutant(
    "ema-cold-start",
    "scores the first observations against the ema's start of (1, 1)",
    "GAT-18",
    source="the method's first form, which trips at once on almost any norm",
)
class EmaColdStart(Functional):
    def ema(self) -> Usual:
        return self.gate["mean"], max(math.sqrt(self.gate["var"]), 0.01)


@mutant("ema-scores-the-second", "leaves only the first observation unscored under ema", "GAT-18")
class EmaScoresTheSecond(InPlace):
    def ema(self) -> Usual:
        return (self.gate["mean"], max(math.sqrt(self.gate["var"]), 0.01)) if self.gate["seen"] else None


@mutant("ema-updated-first", "updates the ema before it scores", "GAT-18")
class EmaUpdatedFirst(InPlace):
    def observe(self, h: float) -> None:
        before = {k: self.gate[k] for k in ("mean", "var", "seen", "history")}
        self.remember(h)
        after = {k: self.gate[k] for k in ("mean", "var")}
        self.gate.update(before)
        if self.rules["baseline"] == "ema":
            self.gate.update(after)
        self.held = before
        super().observe(h)

    def remember(self, h: float) -> None:
        held = getattr(self, "held", None)
        if held is not None and self.rules["baseline"] == "ema":
            self.gate.update({k: held[k] for k in ("mean", "var")})
        self.held = None
        super().remember(h)


@mutant("ema-variance-by-the-new-mean", "takes the variance about the new mean", "GAT-18")
class EmaVarianceByTheNewMean(Functional):
    def remember(self, h: float) -> None:
        omega, var = self.rules["omega"], self.gate["var"]
        super().remember(h)
        off = h - self.gate["mean"]
        self.gate["var"] = (1 - omega) * var + omega * off * off


@mutant("ema-from-the-first-value", "starts the ema from the first observation", "GAT-18")
class EmaFromTheFirstValue(InPlace):
    def remember(self, h: float) -> None:
        if not self.gate["seen"]:
            self.gate["mean"], self.gate["var"] = h, 0.0
        super().remember(h)


@mutant("ema-without-a-floor", "puts no floor under the ema's deviation", "GAT-19")
class EmaWithoutAFloor(Functional):
    def ema(self) -> Usual:
        return (self.gate["mean"], math.sqrt(self.gate["var"])) if self.gate["seen"] >= 2 else None


@mutant("ema-floor-of-a-tenth", "puts a floor of 0.1 under the ema's deviation", "GAT-19")
class EmaFloorOfATenth(InPlace):
    def ema(self) -> Usual:
        found = super().ema()
        return found and (found[0], max(found[1], 0.1))


@mutant("ema-is-the-window", "uses the window whatever baseline is asked for", "GAT-18", "GAT-19", "GAT-23")
class EmaIsTheWindow(InPlace):
    def ema(self) -> Usual:
        return self.window()
