"""Mistakes where something goes wrong inside a step, and in what a checkpoint keeps."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Failed, Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Gradient


@mutant("non-finite-goes-on", "does not look whether a gradient is finite", "NUM-02", "NUM-03", "NUM-04", "NUM-05")
class NonFiniteGoesOn(Functional):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        g = grad(self.handed_out(point))[1]
        return g, self.norm(g)


@mutant("nan-replaced-by-zero", "replaces non-finite numbers by 0", "NUM-02", "NUM-03", "NUM-04")
class NanReplacedByZero(InPlace):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        loss, g = grad(self.handed_out(point))
        if not math.isfinite(loss):
            raise Failed
        g = {k: np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for k, v in g.items()}
        return g, self.norm(g)


@mutant("loss-not-looked-at", "does not look whether the loss is finite", "NUM-05")
class LossNotLookedAt(Functional):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        return super().ask(lambda p: (0.0, grad(p)[1]), point)


@mutant("infinity-passes", "looks for NaN but not for infinity", "NUM-02", "NUM-03", "NUM-04")
class InfinityPasses(InPlace):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        loss, g = grad(self.handed_out(point))
        if math.isnan(loss) or any(np.isnan(v).any() for v in g.values()) or math.isinf(loss):
            raise Failed
        return g, self.norm(g)


@mutant(
    "failed-step-skipped", "skips a step whose second or third gradient is not finite", "NUM-03", "NUM-04", "NUM-05"
)
class FailedStepSkipped(InPlace):
    def start_over(self) -> str:
        return "skipped"


@mutant(
    "failed-step-keeps-parameters",
    "does not put parameters back after a non-finite gradient",
    "NUM-04",  # theta1 is where the single-pass step ends: after the second gradient nothing shows
    "NUM-05",
)
class FailedStepKeepsParameters(InPlace):
    def start_over(self) -> str:
        return "skipped" if self.first is None else "rolled back"

    def roll_back(self, before: tuple[Arrays, State]) -> None:
        if self.first is None or not isinstance(self.failing(), Failed):
            super().roll_back(before)

    def failing(self) -> BaseException | None:
        import sys

        return sys.exc_info()[1]


@mutant(
    "failed-step-keeps-state",
    "puts parameters back after a failed step but not the optimizer's state",
    "NUM-03",
    "NUM-04",
    "NUM-05",
    "ATM-02",
)
class FailedStepKeepsState(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        self.write(before[0])


@mutant("first-failure-steps", "makes a weight-decay step where the first gradient is not finite", "NUM-02")
class FirstFailureSteps(InPlace):
    def start_over(self) -> str:
        if self.first is None:
            self.advance({k: np.zeros_like(v) for k, v in self.theta.items()})
        return super().start_over()


@mutant("failed-step-observed", "feeds the gate a step that was rolled back", "NUM-06")
class FailedStepObserved(InPlace):
    def counted(self, outcome: str) -> None:
        if outcome == "rolled back" and self.first is not None:
            self.remember(self.first[1])
        super().counted(outcome)


@mutant("zero-gradient-observed", "feeds the gate a step with a zero gradient", "NUM-01")
class ZeroGradientObserved(Functional):
    def counted(self, outcome: str) -> None:
        if outcome == "single" and self.open():
            self.remember(0.0)
        super().counted(outcome)


@mutant("exception-swallowed", "swallows what the loss raises", "ATM-01")
class ExceptionSwallowed(Functional):
    def outer(self, grad: Gradient) -> None:
        with contextlib.suppress(Exception):
            super().outer(grad)


@mutant("exception-replaced", "raises an exception of its own in place of the loss's", "ATM-01")
class ExceptionReplaced(InPlace):
    def outer(self, grad: Gradient) -> None:
        try:
            super().outer(grad)
        except Exception:
            failed = True
        else:
            failed = False
        if failed:
            raise RuntimeError("step failed")


@mutant("exception-leaves-parameters", "leaves parameters where the loss raised", "ATM-01")
class ExceptionLeavesParameters(InPlace):
    @np.errstate(all="ignore")
    def outer(self, grad: Gradient) -> None:
        before = self.copies()
        self.first = None
        try:
            outcome = self.passes(grad, before)
        except Failed:
            self.roll_back(before)
            outcome = self.start_over()
        self.counted(outcome)


@mutant("exception-leaves-state", "puts parameters back when the loss raises but not the optimizer's state", "ATM-02")
class ExceptionLeavesState(InPlace):
    def outer(self, grad: Gradient) -> None:
        with_failure = self.put_state
        try:
            super().outer(grad)
        finally:
            self.put_state = with_failure

    def roll_back(self, before: tuple[Arrays, State]) -> None:
        import sys

        self.write(before[0])
        if isinstance(sys.exc_info()[1], Failed):
            super().roll_back(before)


@mutant("exception-leaves-new-state", "keeps state entries that a raising step created", "ATM-02")
class ExceptionLeavesNewState(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        created = self.state if not before[1] else None
        super().roll_back(before)
        if created:
            self.put_state(created)


@mutant("raising-step-counted", "feeds the gate the step that raised", "ATM-03")
class RaisingStepCounted(InPlace):
    def outer(self, grad: Gradient) -> None:
        try:
            super().outer(grad)
        except Exception:
            if self.first is not None:
                self.remember(self.first[1])
            raise


@mutant(
    "resume-re-arms", "opens the gate on resume", "CKP-03", "CKP-07", source="trainers that rebuild the gate on start"
)
class ResumeReArms(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.gate["closed_at"] = None


def forgetting(*keys: str) -> Any:
    """load() that starts these entries of the gate anew."""

    def load(self: Functional, saved: Any) -> None:
        fresh = self.new_gate()
        Functional.load(self, saved)
        self.gate.update({k: fresh[k] for k in keys})

    return load


@mutant("resume-forgets-the-window", "starts with an empty window on resume", "CKP-01")
class ResumeForgetsTheWindow(Functional):
    load = forgetting("history")


@mutant("resume-forgets-the-streak", "forgets an open streak on resume", "CKP-02")
class ResumeForgetsTheStreak(InPlace):
    load = forgetting("streak", "pin")


@mutant("resume-forgets-the-pin", "forgets what an open streak is scored by on resume", "CKP-02")
class ResumeForgetsThePin(Functional):
    load = forgetting("pin")


@mutant("resume-forgets-the-budget", "counts active steps anew on resume", "CKP-05")
class ResumeForgetsTheBudget(InPlace):
    load = forgetting("active")


@mutant("resume-forgets-the-ema", "starts the ema from (1, 1) on resume", "CKP-06")
class ResumeForgetsTheEma(Functional):
    load = forgetting("mean", "var")


@mutant("resume-forgets-the-count", "leaves two observations unscored after each resume", "CKP-06")
class ResumeForgetsTheCount(InPlace):
    load = forgetting("seen")


@mutant("resume-forgets-the-step", "counts steps anew on resume", "CKP-07", "CKP-08")
class ResumeForgetsTheStep(Functional):
    load = forgetting("step")


@mutant("resume-forgets-the-state", "starts with a fresh optimizer on resume", "CKP-04", "CKP-09")
class ResumeForgetsTheState(InPlace):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.state = {}


@mutant("resume-forgets-the-step-count", "keeps AdamW's moments on resume but counts its steps anew", "CKP-09")
class ResumeForgetsTheStepCount(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        if "n" in self.state:
            self.state = {**self.state, "n": 0}


@mutant("checkpoint-shares-its-arrays", "saves references to arrays that it goes on changing", "CKP-01", "CKP-04")
class CheckpointSharesItsArrays(InPlace):
    def save(self) -> Any:
        return {"theta": self.theta, "state": self.state, "gate": self.gate}

    def put_state(self, state: State) -> None:
        kept = dict(state)
        self.state.clear()
        self.state.update(kept)

    def load(self, saved: Any) -> None:
        self.theta, self.state, self.gate = saved["theta"], saved["state"], saved["gate"]
