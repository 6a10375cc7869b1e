"""Mistakes in counting: steps, active steps, streaks and cooldowns in steps that are zero, failed or raising."""

from __future__ import annotations

from gxpo_conformance.mutants.model import Failed, Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Gradient

# ---- What counts as a step -------------------------------------------------------------------------------------------


@mutant("zero-steps-not-counted", "does not count a step whose gradient is zero", "GAT-14")
class ZeroStepsNotCounted(InPlace):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        if outcome == "single" and self.first and self.first[1] == 0:
            self.gate["step"] -= 1


@mutant("skipped-steps-not-counted", "does not count a step that it skipped", "NUM-06")
class SkippedStepsNotCounted(Functional):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        self.gate["step"] -= outcome == "skipped"


@mutant("rolled-back-steps-not-counted", "does not count a step that it rolled back", "NUM-06")
class RolledBackStepsNotCounted(InPlace):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        self.gate["step"] -= outcome == "rolled back"


@mutant("raising-steps-counted-as-steps", "counts a step that raised", "ATM-03")
class RaisingStepsCountedAsSteps(Functional):
    def outer(self, grad: Gradient) -> None:
        try:
            super().outer(grad)
        except Exception:
            self.gate["step"] += 1
            raise


# ---- The budget ------------------------------------------------------------------------------------------------------


@mutant("rolled-back-steps-cost-budget", "charges the budget for a step that was rolled back", "NUM-03")
class RolledBackStepsCostBudget(Functional):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        self.gate["active"] += outcome == "rolled back"


@mutant(
    "raising-steps-cost-budget", "charges the budget when an active step begins, and keeps it if one raises", "ATM-03"
)
class RaisingStepsCostBudget(InPlace):
    def outer(self, grad: Gradient) -> None:
        starting = self.open()
        try:
            super().outer(grad)
        except Exception:
            self.gate["active"] += starting
            raise


@mutant("zero-steps-cost-budget", "charges the budget for a step with a zero gradient", "GAT-17")
class ZeroStepsCostBudget(InPlace):
    def counted(self, outcome: str) -> None:
        zero = outcome == "single" and self.open() and self.first is not None and self.first[1] == 0
        super().counted(outcome)
        self.gate["active"] += zero


@mutant("warmup-costs-no-budget", "does not charge the budget for the steps of the warm-up", "GAT-17")
class WarmupCostsNoBudget(Functional):
    def counted(self, outcome: str) -> None:
        free = outcome == "active" and self.gate["step"] < self.rules["warmup"]
        super().counted(outcome)
        self.gate["active"] -= free


@mutant("warmup-outlasts-the-budget", "goes on with active steps while it warms up, the budget spent", "GAT-17")
class WarmupOutlastsTheBudget(InPlace):
    def spent(self) -> bool:
        return super().spent() and self.gate["step"] >= self.rules["warmup"]


@mutant("budget-of-zero-is-none", "takes a budget of 0 for no budget", "GAT-17")
class BudgetOfZeroIsNone(Functional):
    def spent(self) -> bool:
        return bool(self.rules["max_active_steps"]) and super().spent()


@mutant("budget-anew-after-a-cooldown", "counts active steps from the latest trip on", "GAT-25")
class BudgetAnewAfterACooldown(InPlace):
    def trip(self) -> None:
        super().trip()
        self.gate["active"] = -1  # the tripping step is counted after this


# ---- Cooldown and warm-up --------------------------------------------------------------------------------------------


@mutant("cooldown-of-zero-is-none", "takes a cooldown of 0 for none: closed for good", "GAT-15")
class CooldownOfZeroIsNone(InPlace):
    def cooled(self) -> bool:
        return bool(self.rules["cooldown"]) and super().cooled()


@mutant("second-trip-ignored", "closes once: a second trip after a cooldown changes nothing", "GAT-15")
class SecondTripIgnored(Functional):
    def trip(self) -> None:
        if self.gate["closed_at"] is None:
            super().trip()
        else:
            self.calm()


@mutant("warms-up-after-a-cooldown", "warms up again after a cooldown, observing nothing", "GAT-15")
class WarmsUpAfterACooldown(Functional):
    def watching(self) -> bool:
        closed, n = self.gate["closed_at"], self.rules["cooldown"]
        since = self.gate["step"] - (closed + 1 + n) if closed is not None and n is not None else self.gate["step"]
        return super().watching() and since >= self.rules["warmup"]


# ---- Streaks ---------------------------------------------------------------------------------------------------------


@mutant("rollback-ends-the-streak", "ends an open streak at a step that it rolled back", "NUM-06")
class RollbackEndsTheStreak(InPlace):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        if outcome == "rolled back":
            self.calm()


@mutant("skipped-step-ends-the-streak", "ends an open streak at a step that it skipped", "NUM-06")
class SkippedStepEndsTheStreak(Functional):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        if outcome == "skipped":
            self.calm()


@mutant("zero-step-ends-the-streak", "ends an open streak at a step with a zero gradient", "NUM-01")
class ZeroStepEndsTheStreak(Functional):
    def counted(self, outcome: str) -> None:
        super().counted(outcome)
        if outcome == "single":
            self.calm()


@mutant("exception-ends-the-streak", "ends an open streak when a step raises", "ATM-03")
class ExceptionEndsTheStreak(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        import sys

        super().roll_back(before)
        if not isinstance(sys.exc_info()[1], Failed):
            self.calm()


@mutant("pin-outlives-the-trip", "scores the first value after a cooldown by the tripping streak's baseline", "GAT-16")
class PinOutlivesTheTrip(Functional):
    def trip(self) -> None:
        pin = self.gate["pin"]
        super().trip()
        self.gate["pin"] = pin


@mutant("ema-frozen-under-a-streak", "does not update the ema while a streak is open", "GAT-23")
class EmaFrozenUnderAStreak(InPlace):
    def remember(self, h: float) -> None:
        kept = {k: self.gate[k] for k in ("mean", "var")}
        super().remember(h)
        if self.gate["streak"]:
            self.gate.update(kept)
