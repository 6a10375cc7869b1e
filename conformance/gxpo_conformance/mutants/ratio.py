"""Mistakes in the ratio, the activity rule and the clipping that goes before them."""

from __future__ import annotations

import itertools
import math

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, mutant
from gxpo_conformance.protocol import Arrays


@mutant("ratio-of-norms", "takes one ratio for a whole tensor, |g1| / |g0|", "EST-01")
class RatioOfNorms(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.full_like(before, np.linalg.norm(after) / np.linalg.norm(before))


@mutant("ratio-inverted", "divides g0 by g1", "EST-01")
class RatioInverted(InPlace):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return super().ratio(after, before)


@mutant("ratio-of-magnitudes", "takes |g1| / |g0|, without the sign", "EST-01")
class RatioOfMagnitudes(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.abs(super().ratio(before, after))


@mutant("ratio-with-a-constant", "adds 1e-8 to the denominator of the ratio", "INV-05", source="common habit")
class RatioWithAConstant(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return super().ratio(before + np.sign(before) * self.kind(1e-8), after)


@mutant("ratio-clamped-to-one", "clamps the ratio to [0, 1], as if no gradient could grow or turn", "EXT-01", "EXT-02")
class RatioClampedToOne(InPlace):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.clip(super().ratio(before, after), 0, 1)


@mutant("overflow-as-infinity", "lets a ratio that overflows reach the parameters", "EST-04")
class OverflowAsInfinity(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return after / before

    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return np.where(np.isinf(q), q, super().bound(q, K))


@mutant("no-activity-rule", "extrapolates every coordinate, however small its g0", "EST-02")
class NoActivityRule(Functional):
    def active(self, before: np.ndarray) -> np.ndarray:
        return before != 0


@mutant("activity-by-mean", "compares |g0| with 1e-3 of its mean magnitude in place of its RMS", "EST-02")
class ActivityByMean(InPlace):
    def active(self, before: np.ndarray) -> np.ndarray:
        return np.abs(before) > 1e-3 * np.mean(np.abs(before))


@mutant("activity-at-1e-2", "takes 1e-2 for the activity bound", "EST-02")
class ActivityAtOnePercent(Functional):
    def active(self, before: np.ndarray) -> np.ndarray:
        return np.abs(before) > 1e-2 * np.sqrt(np.mean(before * before))


@mutant("activity-absolute", "compares |g0| with 1e-3, whatever the tensor's scale", "EST-02")
class ActivityAbsolute(InPlace):
    def active(self, before: np.ndarray) -> np.ndarray:
        return np.abs(before) > 1e-3


@mutant("activity-over-all", "takes the RMS over all tensors together", "EST-03")
class ActivityOverAll(Functional):
    overall = 0.0

    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        before = g[0] if self.config["estimator"] == "gradient" else {k: theta[1][k] - v for k, v in theta[0].items()}
        self.overall = self.norm(before) / math.sqrt(sum(v.size for v in before.values()))
        return super().scales(theta, g)

    def active(self, before: np.ndarray) -> np.ndarray:
        return np.abs(before) > 1e-3 * self.overall


@mutant(
    "inactive-at-the-ceiling",
    "gives an inactive coordinate q = K/2 + 1",
    "EST-02",
    source="0/0 with a small constant in both, clamped",
)
class InactiveAtTheCeiling(Functional):
    def inactive(self, K: int) -> float:
        return K / 2 + 1


@mutant("inactive-frozen", "leaves an inactive coordinate at theta0, q = 0", "EST-02")
class InactiveFrozen(InPlace):
    def inactive(self, K: int) -> float:
        return 0.0


@mutant("displacement-activity-reads-g0", "lets the activity of displacements read g0", "EST-11")
class DisplacementActivityReadsG0(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        if self.config["estimator"] != "displacement":
            return made
        active = super().active
        return {k: np.where(active(g[0][k]), q, 1) for k, q in made.items()}

    def active(self, before: np.ndarray) -> np.ndarray:
        return before != 0 if self.config["estimator"] == "displacement" else super().active(before)


@mutant("displacement-over-two-steps", "divides theta2 - theta0 by theta1 - theta0", "EST-10")
class DisplacementOverTwoSteps(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        if self.config["estimator"] == "displacement":
            theta = [theta[0], theta[1], {k: theta[1][k] + (v - theta[0][k]) for k, v in theta[2].items()}]
        return super().scales(theta, g)


@mutant("displacement-is-the-gradient", "uses the gradients' ratio whatever estimator is asked for", "EST-10", "EST-12")
class DisplacementIsTheGradient(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = {}
        for k in theta[0]:
            q = self.scale(self.ratio(g[0][k], g[1][k]), self.config["horizon"])
            made[k] = np.where(self.active(g[0][k]), q, self.kind(1))
        return made


@mutant("tensor-mean-of-ratios", "averages the coordinates' ratios for a tensor's one", "EST-12")
class TensorMeanOfRatios(Functional):
    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        return np.full(u0.shape, np.clip(np.mean(u1 / u0), -2, 3), dtype=self.kind)


@mutant("tensor-ratio-of-norms", "takes |u1| / |u0| for a tensor's ratio", "EST-12")
class TensorRatioOfNorms(InPlace):
    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        return np.full(u0.shape, np.clip(np.linalg.norm(u1) / np.linalg.norm(u0), -2, 3), dtype=self.kind)


@mutant("tensor-over-all", "takes one ratio for all tensors together", "EST-12")
class TensorOverAll(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        if self.config["estimator"] != "tensor":
            return super().scales(theta, g)
        u = [np.concatenate([(b[k] - a[k]).ravel() for k in a]) for a, b in itertools.pairwise(theta)]
        r = self.tensor_ratio(*u)[0]
        q = self.scale(r, self.config["horizon"]) if np.isfinite(r) else 1.0
        return {k: np.full(v.shape, q, dtype=self.kind) for k, v in theta[0].items()}


@mutant("tensor-at-rest-at-half-k", "gives a tensor that did not move r = 1", "EST-13")
class TensorAtRestAtHalfK(InPlace):
    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        return super().tensor_ratio(u0, u1) if u0.any() else np.ones_like(u0)


@mutant("tensor-with-a-constant", "adds 1e-8 to the denominator of a tensor's ratio", "EST-14", source="common habit")
class TensorWithAConstant(Functional):
    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        return np.full(u0.shape, np.sum(u0 * u1) / (np.sum(u0 * u0) + 1e-8), dtype=self.kind)


@mutant("ratio-of-unclipped", "takes the ratio of the gradients before clipping", "CLP-02")
class RatioOfUnclipped(Functional):
    raw: dict[int, Arrays]

    def clip(self, g: Arrays, norm: float) -> Arrays:
        clipped = super().clip(g, norm)
        self.raw = {**getattr(self, "raw", {}), id(clipped): g}
        self.keep = [*getattr(self, "keep", [])[-4:], clipped]  # so that no id is used again
        return clipped

    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        return super().scales(theta, [self.raw[id(v)] for v in g])


@mutant("clip-by-the-first", "clips all three gradients by the first one's coefficient", "CLP-01")
class ClipByTheFirst(Functional):
    first_norm: float | None = None

    def clip(self, g: Arrays, norm: float) -> Arrays:
        self.first_norm = norm if self.first_norm is None else self.first_norm
        return super().clip(g, self.first_norm)

    def counted(self, outcome: str) -> None:
        self.first_norm = None
        super().counted(outcome)


@mutant("clip-each-tensor", "clips every tensor by its own norm", "CLP-01")
class ClipEachTensor(InPlace):
    def clip(self, g: Arrays, norm: float) -> Arrays:
        clip = super().clip
        return {k: clip({k: v}, self.norm({k: v}))[k] for k, v in g.items()}


@mutant("clip-without-1e-6", "leaves the 1e-6 out of the clip coefficient", "CLP-01")
class ClipWithoutConstant(Functional):
    def coefficient(self, norm: float) -> float:
        return super().coefficient(norm - 1e-6)


@mutant("clip-by-value", "clips each coordinate to [-C, C]", "CLP-01")
class ClipByValue(InPlace):
    def clip(self, g: Arrays, norm: float) -> Arrays:
        C = self.config["max_grad_norm"]
        return g if C is None else {k: np.clip(v, -C, C) for k, v in g.items()}


@mutant("single-pass-unclipped", "does not clip a single pass", "CLP-04")
class SinglePassUnclipped(Functional):
    def clip(self, g: Arrays, norm: float) -> Arrays:
        return super().clip(g, norm) if self.open() else g


@mutant(
    "gate-reads-clipped-norm",
    "feeds the gate the clipped norm",
    "CLP-03",
    source="seen where clip_grad_norm_ runs first",
)
class GateReadsClippedNorm(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return super().statistic(g, [n * self.coefficient(n) for n in norms])
