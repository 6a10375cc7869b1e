"""Mistakes that sizes and scales hide: blocks, tails, empty tensors, absolute floors, sums that lose what is small."""

from __future__ import annotations

import math

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, mutant
from gxpo_conformance.mutants.numbers import FINE
from gxpo_conformance.protocol import Arrays

# ---- Blocks and tails, as kernels have them --------------------------------------------------------------------------


@mutant("rms-by-blocks", "takes the RMS over blocks of 1024 entries", "EST-02")
class RmsByBlocks(Functional):
    def rms(self, before: np.ndarray) -> np.ndarray:
        flat, own_rms = before.reshape(-1), super().rms
        parts = [flat[n : n + 1024] for n in range(0, flat.size, 1024)]
        each = [np.full(p.size, own_rms(p), dtype=self.kind) for p in parts]
        return np.concatenate([np.zeros(0, dtype=self.kind), *each]).reshape(before.shape)


@mutant("rms-of-the-padded", "divides the RMS's sum by the size padded to a multiple of 8", "EST-02")
class RmsOfThePadded(InPlace):
    def rms(self, before: np.ndarray) -> np.ndarray:
        padded = max(8, -(-before.size // 8) * 8)
        return super().rms(before) * self.kind(math.sqrt(before.size / padded))


@mutant("tail-at-rest", "lets the tail of a tensor that is no multiple of 64 long take no part", "EST-02")
class TailAtRest(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        for q in made.values():
            if q.size > 64:
                q.reshape(-1)[q.size - q.size % 64 :] = 1
        return made


@mutant("norm-of-a-thousand", "takes the norm over the first 1024 entries of each tensor", "CLP-01")
class NormOfAThousand(Functional):
    def norm(self, g: Arrays) -> float:
        return super().norm({k: v.reshape(-1)[:1024] for k, v in g.items()})


@mutant("norm-of-a-hundred", "watches the norm over the first 128 entries of each tensor", "GAT-07")
class NormOfAHundred(InPlace):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        norms = [self.norm({k: v.reshape(-1)[:128] for k, v in a.items()}) for a in g]
        return super().statistic(g, norms)


@mutant("empty-tensor-takes-one", "counts an entry of the tensor after an empty one twice in norms", "DEV-01")
class EmptyTensorTakesOne(InPlace):
    def norm(self, g: Arrays) -> float:
        flat = np.concatenate([np.zeros(0, dtype=self.kind), *(v.ravel() for v in g.values())])
        starts = np.cumsum([0, *(v.size for v in g.values())])[:-1]
        squares = np.add.reduceat(flat.astype(np.float64) ** 2, np.minimum(starts, max(flat.size - 1, 0)))
        return math.sqrt(float(np.sum(squares)))


@mutant("powers-up-to-sixteen", "sums no more than 16 powers, however far the horizon", "EXT-01")
class PowersUpToSixteen(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return self.bound(super().scale(r, min(K, 16 + K % 2)), K)


# ---- Absolute floors -------------------------------------------------------------------------------------------------


@mutant("pole-within-a-thousandth", "takes q = 1 within 1e-3 of r = -1 where K is odd", "EXT-05", shows=FINE)
class PoleWithinAThousandth(InPlace):
    def at_the_pole(self, r: np.ndarray) -> np.ndarray:
        return r <= -1 + 1e-3


@mutant("displacement-floor-of-1e-12", "takes a displacement below 1e-12 for none", "EST-11")
class DisplacementFloor(Functional):
    def active(self, before: np.ndarray) -> np.ndarray:
        return super().active(before) & ((np.abs(before) > 1e-12) | (self.config["estimator"] != "displacement"))


@mutant("tensor-floor-of-1e-20", "takes a tensor for one at rest whose squares add up to less than 1e-20", "EST-14")
class TensorFloor(InPlace):
    def tensor_ratio(self, u0: np.ndarray, u1: np.ndarray) -> np.ndarray:
        moved = float(np.sum(u0.astype(np.float64) ** 2)) >= 1e-20
        return super().tensor_ratio(u0, u1) if moved else np.full(u0.shape, np.nan, dtype=self.kind)


@mutant("cosine-floor-of-1e-8", "puts a floor of 1e-8 under the product of norms in the cosine", "GAT-21",
        source="a framework's cosine_similarity")  # fmt: skip
class CosineFloor(InPlace):
    def cosine(self, a: Arrays, b: Arrays, sizes: float) -> float:
        return super().cosine(a, b, max(sizes, 1e-8))


@mutant("zero-below-1e-3", "takes a gradient whose norm is below 1e-3 for zero", "INV-05")
class ZeroBelowAThousandth(Functional):
    def nothing(self, norm: float) -> bool:
        return norm < 1e-3


@mutant("activity-floor-of-1e-6", "lets no coordinate below 1e-6 take part", "EST-03")
class ActivityFloor(InPlace):
    def active(self, before: np.ndarray) -> np.ndarray:
        return super().active(before) & (np.abs(before) > (1e-6 if self.config["estimator"] == "gradient" else 0))


@mutant("ratio-plus-1e-12", "adds 1e-12 to the denominator of the ratio", "EST-01", shows=FINE)
class RatioPlus(Functional):
    def ratio(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return super().ratio(before + np.sign(before) * self.kind(1e-12), after)


# ---- Sums ------------------------------------------------------------------------------------------------------------


@mutant("rms-by-running-sums", "takes each tensor's squares as a difference of sums over all before it", "EST-03")
class RmsByRunningSums(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        before = g[0] if self.config["estimator"] == "gradient" else {k: theta[1][k] - t for k, t in theta[0].items()}
        total, self.sums = self.kind(0), {}
        for v in before.values():
            after = self.kind(total + np.sum(v * v))
            self.sums[v.size, v.tobytes()], total = after - total, after
        return super().scales(theta, g)

    def rms(self, before: np.ndarray) -> np.ndarray:
        return np.sqrt(self.sums[before.size, before.tobytes()] / max(before.size, 1))


@mutant("norm-in-float32", "computes norms in float32", "GAT-03", "GAT-09", shows=FINE)
class NormInFloat32(Functional):
    def norm(self, g: Arrays) -> float:
        return float(np.float32(super().norm(g)))


# ---- What the gate keeps of a norm: seen where scales and gates meet, as they do in random runs ----------------------


@mutant("norms-capped", "takes norms above 2000 for 2000 where it observes them", "RND-01")
class NormsCapped(InPlace):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        return super().statistic(g, [min(n, 2000.0) for n in norms])


@mutant("small-norms-cut-off", "takes norms below 1e-5 for 0 where it observes them", "GAT-07")
class SmallNormsCutOff(Functional):
    def statistic(self, g: list[Arrays], norms: list[float]) -> float:
        h = super().statistic(g, norms)
        return 0.0 if h < 1e-5 and self.rules["statistic"] in ("corrective_norm", "initial_norm") else h
