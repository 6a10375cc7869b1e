"""Mistakes in what the gate has on top: patience, warm-up, cooldown, a budget, the ema baseline."""

from __future__ import annotations

import math

from gxpo_conformance.mutants.model import Functional, InPlace, mutant
from gxpo_conformance.mutants.model_gate import Usual


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
