"""Mistakes that one setting hides and another shows: rules that meet in one step, and one of them is forgotten."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.mutants.model_gate import Usual
from gxpo_conformance.protocol import Arrays, Gradient

Settings = dict[str, Any]


# ---- Clipping beside something else ----------------------------------------------------------------------------------


@mutant("rollback-unclipped", "makes the single pass after a rollback with g0 as it was before clipping", "NUM-03")
class RollbackUnclipped(InPlace):
    def start_over(self) -> str:
        if self.first is None:
            return "skipped"
        self.advance(self.first[0])
        return "rolled back"


@mutant("initial-norm-clipped", "watches the norm of the clipped g0", "GAT-20")
class InitialNormClipped(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        h = super().statistic(g, norms)
        return h * self.coefficient(h) if self.rules["statistic"] == "initial_norm" else h


@mutant("activity-clipped-by-unclipped", "compares the clipped g0 with the RMS of the unclipped one", "CLP-02")
class ActivityClippedByUnclipped(InPlace):
    c = 1.0

    def clip(self, g: Arrays, norm: float) -> Arrays:
        if self.asked_first:
            self.c = self.coefficient(norm)
        return super().clip(g, norm)

    asked_first = False

    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        self.asked_first = self.first is None
        return super().ask(grad, point)

    def rms(self, before: np.ndarray) -> np.ndarray:
        return super().rms(before) / self.kind(self.c if self.config["estimator"] == "gradient" else 1.0)


@mutant("clips-above-only", "clips only where the norm is above C", "CLP-01")
class ClipsAboveOnly(Functional):
    def coefficient(self, norm: float) -> float:
        C = self.config["max_grad_norm"]
        return 1.0 if C is None or norm <= C else C / (norm + 1e-6)


# ---- The optimizer's state in unusual steps --------------------------------------------------------------------------


@mutant("rollback-keeps-the-step-count", "puts AdamW's moments back after a failed pass, not its step count", "NUM-03")
class RollbackKeepsTheStepCount(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        n = self.state.get("n")
        super().roll_back(before)
        if "n" in self.state:
            self.state["n"] = n


@mutant("restore-forgets-the-rollback", "leaves the state at s0 after a rollback under restore", "NUM-03")
class RestoreForgetsTheRollback(InPlace):
    def start_over(self) -> str:
        s0, outcome = self.state, super().start_over()
        if outcome == "rolled back" and self.config["optimizer_state"] == "restore":
            self.put_state(s0)
        return outcome


@mutant("restore-forgets-single-passes", "puts the state of s0 back after a single pass too, under restore", "OPT-05")
class RestoreForgetsSinglePasses(Functional):
    def counted(self, outcome: str) -> None:
        if outcome == "single" and self.config["optimizer_state"] == "restore" and self.before:
            self.state = self.before
        super().counted(outcome)

    before: State | None = None

    def outer(self, grad: Gradient) -> None:
        self.before = self.state
        super().outer(grad)


@mutant("decay-of-theta0", "decays all three passes by the parameters that the step began with", "OPT-03")
class DecayOfTheta0(Functional):
    def outer(self, grad: Gradient) -> None:
        self.began = self.theta
        super().outer(grad)

    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        made, after = super().adamw(theta, state, g, {**o, "weight_decay": 0.0})
        share = self.kind(o["lr"] * o["weight_decay"])
        return {k: self.store(v - share * self.began[k]) for k, v in made.items()}, after


@mutant("adam-skips-tensors-at-rest", "leaves a tensor alone whose gradient is all zero", "OPT-03")
class AdamSkipsTensorsAtRest(Functional):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        made, after = super().adamw(theta, state, g, o)
        return {k: v if g[k].any() else theta[k] for k, v in made.items()}, after


@mutant("scalars-do-not-decay", "has no weight decay for parameters without dimensions", "OPT-02")
class ScalarsDoNotDecay(Functional):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        decay = self.kind(o["weight_decay"])
        g = {k: v if v.ndim else v - decay * theta[k] for k, v in g.items()} if decay else g
        return super().sgd(theta, state, g, o)


# ---- Estimators ------------------------------------------------------------------------------------------------------


@mutant("displacement-without-decay", "takes AdamW's decay out of the displacements that it divides", "EST-10")
class DisplacementWithoutDecay(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        o = self.config["optimizer"]
        if self.config["estimator"] == "displacement" and o["name"] == "adamw":
            share = self.kind(o["lr"] * o["weight_decay"])
            first = {k: t + share * theta[0][k] for k, t in theta[1].items()}
            second = {k: first[k] + t - theta[1][k] + share * theta[1][k] for k, t in theta[2].items()}
            theta = [theta[0], first, second]
        return super().scales(theta, g)


@mutant("displacement-rms-over-all", "takes the RMS of displacements over all tensors together", "EST-11")
class DisplacementRmsOverAll(Functional):
    overall = np.zeros(())

    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        moved = {k: theta[1][k] - t for k, t in theta[0].items()}
        self.overall = np.asarray(self.norm(moved) / math.sqrt(sum(v.size for v in moved.values())))
        return super().scales(theta, g)

    def rms(self, before: np.ndarray) -> np.ndarray:
        return self.overall if self.config["estimator"] == "displacement" else super().rms(before)


@mutant("displacement-all-that-moved", "lets every coordinate that moved take part under displacement", "EST-11")
class DisplacementAllThatMoved(InPlace):
    def active(self, before: np.ndarray) -> np.ndarray:
        return before != 0 if self.config["estimator"] == "displacement" else super().active(before)


@mutant(
    "tensor-neutral-by-gradient", "takes a tensor for one at rest where g0 is zero, though momentum moves it", "EST-12"
)
class TensorNeutralByGradient(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        if self.config["estimator"] != "tensor":
            return made
        return {k: q if g[0][k].any() else np.ones_like(q) for k, q in made.items()}


# ---- What is not finite ----------------------------------------------------------------------------------------------


@mutant("single-pass-unchecked", "does not look whether g0 is finite once the gate is closed", "NUM-02")
class SinglePassUnchecked(InPlace):
    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return super().finite(loss, g, norm) or not self.open()


@mutant("first-tensor-checked", "looks for non-finite numbers in the first tensor only", "NUM-02")
class FirstTensorChecked(Functional):
    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return math.isfinite(loss) and bool(np.isfinite(next(iter(g.values()))).all())


@mutant("minus-infinity-is-a-loss", "takes any loss below infinity for finite", "NUM-05")
class MinusInfinityIsALoss(InPlace):
    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return loss < math.inf and math.isfinite(norm)


@mutant("zero-before-the-loss", "makes the plain step at a zero gradient without a look at the loss", "NUM-05")
class ZeroBeforeTheLoss(Functional):
    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return super().finite(loss, g, norm) or norm == 0


# ---- The gate's options ----------------------------------------------------------------------------------------------


@mutant("two-sided-not-with-ema", "ignores two_sided where the baseline is ema", "GAT-18")
class TwoSidedNotWithEma(Functional):
    def surprising(self, z: float | None) -> bool:
        if self.rules["baseline"] == "ema" and z is not None and z < 0:
            return False
        return super().surprising(z)


@mutant("low-values-need-no-patience", "trips at the first low value under two_sided, whatever patience", "GAT-13")
class LowValuesNeedNoPatience(Functional):
    def observe(self, h: float) -> None:
        z = self.score(h, self.usual())
        if z is not None and z < 0 and self.surprising(z):
            self.gate["streak"] = self.rules["patience"] - 1
        super().observe(h)


@mutant("ema-in-warmup", "updates the ema's mean and variance while it warms up", "GAT-18")
class EmaInWarmup(Functional):
    def watching(self) -> bool:
        found = super().watching()
        self.warming = not found and self.rules["statistic"] != "never"
        return found or self.warming

    def observe(self, h: float) -> None:
        if not self.warming:
            return super().observe(h)
        kept = {k: self.gate[k] for k in ("history", "seen")}
        self.remember(h)
        self.gate.update(kept)
        return None


@mutant("ema-counts-warmup", "counts the steps of the warm-up as observations of the ema", "GAT-18")
class EmaCountsWarmup(InPlace):
    def ema(self) -> Usual:
        seen, self.gate["seen"] = self.gate["seen"], self.gate["seen"] + self.rules["warmup"]
        found = super().ema()
        self.gate["seen"] = seen
        return found


@mutant("disagreement-by-tensor", "takes the mean of the tensors' cosines", "GAT-21")
class DisagreementByTensor(Functional):
    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        own = super().cosine
        each = [own({k: a[k]}, {k: b[k]}, self.norm({k: a[k]}) * self.norm({k: b[k]})) for k in a]
        return sum(each) / len(each)


@mutant("supplied-one-step-old", "watches the number handed in with the step before", "GAT-26")
class SuppliedOneStepOld(InPlace):
    def step(self, grad: Gradient, statistic: float | None = None) -> None:
        last, self.handed = getattr(self, "handed", statistic), statistic
        super().step(grad, last)


@mutant("supplied-in-single-passes", "observes the number handed in with a single pass", "GAT-26")
class SuppliedInSinglePasses(Functional):
    def counted(self, outcome: str) -> None:
        if outcome == "single" and self.rules["statistic"] == "supplied" and self.gate["closed_at"] is not None:
            self.remember(self.supplied or 0.0)
        super().counted(outcome)


@mutant("initial-norm-at-once", "observes the norm of g0 before the step is known to complete", "NUM-06")
class InitialNormAtOnce(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        super().roll_back(before)
        if self.rules["statistic"] == "initial_norm" and self.first and self.watching():
            self.observe(self.first[1])


@mutant("initial-norm-of-single-passes", "records the norm of g0 in single passes as well", "GAT-20")
class InitialNormOfSinglePasses(InPlace):
    def counted(self, outcome: str) -> None:
        closed = self.gate["closed_at"] is not None and outcome == "single"
        if closed and self.first and self.rules["statistic"] == "initial_norm":
            self.remember(self.first[1])
        super().counted(outcome)


@mutant("tensor-ratio-keeps-under-ema", "lets the state go on from s2 where a tensor's ratio meets the ema", "RND-02")
class TensorRatioKeepsUnderEma(Functional):
    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        together = self.config["estimator"] == "tensor" and self.rules["baseline"] == "ema"
        return s2 if together else super().state_of_the_last_step(s0, s2)
