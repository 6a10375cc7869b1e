"""Mistakes that some numbers hide: complements, constants that agree with a default, precision lost on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.mutants.model_gate import Usual
from gxpo_conformance.protocol import Arrays, Config

Settings = dict[str, Any]
FINE = ("float64",)  # a mistake that float32 has no room for


# ---- AdamW -----------------------------------------------------------------------------------------------------------


@mutant("adam-moment-weights-swapped", "weighs AdamW's first moment by 1 - beta1, and the gradient by beta1", "OPT-03")
class AdamMomentWeightsSwapped(Functional):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        b1, b2 = o["betas"]
        return super().adamw(theta, state, g, {**o, "betas": [1 - b1, b2]})

    def corrections(self, n: int, b1: float, b2: float) -> tuple[float, float]:
        return super().corrections(n, 1 - b1, b2)


@mutant("adam-eps-before-the-correction", "adds AdamW's eps before it corrects the second moment", "OPT-03")
class AdamEpsBeforeTheCorrection(InPlace):
    def root(self, v: np.ndarray, c2: float, eps: float) -> np.ndarray:
        return (np.sqrt(v) + eps) / math.sqrt(c2)


@mutant("adam-corrects-by-0.999", "corrects AdamW's second moment for a beta2 of 0.999, whatever it is", "OPT-03")
class AdamCorrectsByTheUsual(Functional):
    def corrections(self, n: int, b1: float, b2: float) -> tuple[float, float]:
        return super().corrections(n, b1, 0.999)


@mutant("adam-eps-of-1e-8", "takes 1e-8 for AdamW's eps, whatever it is", "OPT-03")
class AdamEpsOfTheDefault(InPlace):
    def root(self, v: np.ndarray, c2: float, eps: float) -> np.ndarray:
        return super().root(v, c2, 1e-8)


@mutant("adam-beta1-zero-is-default", "takes a beta1 of 0 for none given, 0.9", "OPT-03")
class AdamBeta1ZeroIsDefault(Functional):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().adamw(theta, state, g, {**o, "betas": [o["betas"][0] or 0.9, o["betas"][1]]})


# ---- Settings kept in float32, in a float64 run ----------------------------------------------------------------------


def in_float32(value: float) -> float:
    return float(np.float32(value))


@mutant("lr-in-float32", "keeps the learning rate in float32", "OPT-01", shows=FINE, source="a framework's SGD")
class LrInFloat32(InPlace):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().sgd(theta, state, g, {**o, "lr": in_float32(o["lr"])})


@mutant("momentum-in-float32", "keeps the momentum in float32", "OPT-02", shows=FINE)
class MomentumInFloat32(Functional):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().sgd(theta, state, g, {**o, "momentum": in_float32(o["momentum"])})


@mutant("betas-in-float32", "keeps AdamW's betas in float32", "OPT-03", shows=FINE)
class BetasInFloat32(InPlace):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().adamw(theta, state, g, {**o, "betas": [in_float32(b) for b in o["betas"]]})


@mutant("alpha-in-float32", "keeps alpha in float32", "MOV-02", shows=FINE)
class AlphaInFloat32(Functional):
    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, {**config, "alpha": in_float32(config["alpha"])}, dtype)


@mutant("scale-in-float32", "computes q in float32", "EXT-01", "EXT-02", shows=FINE)
class ScaleInFloat32(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return super().scale(r.astype(np.float32), K)

    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return super().bound(q.astype(np.float32), K)


@mutant("window-in-float32", "keeps the gate's window in float32", "GAT-09", shows=FINE)
class WindowInFloat32(InPlace):
    def remember(self, h: float) -> None:
        super().remember(h)
        self.gate["history"][-1] = in_float32(h)


# ---- The gate's formulas ---------------------------------------------------------------------------------------------


@mutant("omega-on-the-old", "weighs the old mean by omega and the observation by 1 - omega", "GAT-18")
class OmegaOnTheOld(Functional):
    def remember(self, h: float) -> None:
        rules = self.rules
        self.rules = {**rules, "omega": 1 - rules["omega"]}
        super().remember(h)
        self.rules = rules


@mutant("omega-of-a-tenth", "takes 0.1 for omega, whatever it is", "GAT-18")
class OmegaOfATenth(InPlace):
    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, {**config, "gate": {**config["gate"], "omega": 0.1}}, dtype)


@mutant("threshold-of-three", "takes 3 for the threshold, whatever it is", "GAT-01")
class ThresholdOfThree(InPlace):
    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, {**config, "gate": {**config["gate"], "threshold": 3.0}}, dtype)


@mutant(
    "variance-by-squares", "takes the deviation from the mean of squares less the squared mean", "GAT-03", shows=FINE
)
class VarianceBySquares(Functional):
    def window(self) -> Usual:
        found, past = super().window(), np.array(self.gate["history"][-self.rules["window"] :])
        return found and (found[0], math.sqrt(max(0.0, float(np.mean(past * past)) - found[0] ** 2)))


@mutant("disagreement-squared", "watches 1 - cos^2 in place of 1 - |cos|", "GAT-21")
class DisagreementSquared(Functional):
    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        return super().cosine(a, b, sizes) ** 2


# ---- q ---------------------------------------------------------------------------------------------------------------


@mutant("cap-floored", "clamps q at K // 2 + 1", "EXT-04")
class CapFloored(InPlace):
    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return np.clip(q, 1, K // 2 + 1).astype(self.kind)


@mutant("ratio-clamped-at-two", "clamps the ratio at 2, which K = 3 alone lets through", "EXT-04")
class RatioClampedAtTwo(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.minimum(super().ratio(before, after), self.kind(2))


@mutant("zero-loss-is-none", "takes a loss of exactly 0 for none, and skips the step", "CST-01")
class ZeroLossIsNone(InPlace):
    def finite(self, loss: float, g: Arrays, norm: float) -> bool:
        return super().finite(loss, g, norm) and loss != 0
