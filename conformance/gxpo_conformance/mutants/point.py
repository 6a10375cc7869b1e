"""Mistakes in q, in the virtual point, the partial move and the corrective step; and identities that they break."""

from __future__ import annotations

import math

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Config, Gradient


@mutant(
    "closed-form",
    "computes q by (1 - r^K + eps) / (1 - r^2 + eps), which loses r = 1",
    "EXT-03",
    "INV-03",
    source="the published arithmetic",
)
class ClosedForm(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        eps = self.kind(1e-8)
        return self.bound(np.nan_to_num((1 - r**K + eps) / (1 - r**2 + eps), nan=1.0), K)


@mutant("closed-form-patched", "takes K/2 within 1e-3 of r = 1 and the closed form elsewhere", "EXT-03")
class ClosedFormPatched(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.where(np.abs(1 - r) < 1e-3, self.kind(K / 2), super().scale(r, K))


@mutant("sum-to-k", "sums K + 1 powers in place of K", "EXT-01", "EXT-02", "INV-03")
class SumToK(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        q = sum(r**n for n in range(K + 1)) / (1 + r)
        return self.bound(np.where(r <= -1 + 1e-8, 1, q), K)


@mutant("even-powers-only", "drops the last term where K is odd", "EXT-02", "INV-03")
class EvenPowersOnly(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return super().scale(r, K - K % 2)


@mutant("odd-term-undivided", "adds r^(K-1) without dividing it by 1 + r where K is odd", "EXT-02", "INV-04")
class OddTermUndivided(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        q = super().scale(r, K - K % 2)
        return self.bound(q + r ** (K - 1) if K % 2 else q, K)


@mutant("in-units-of-one-step", "divides by one step's length, q = S_K(r)", "EXT-01", "EXT-02", "INV-01")
class InUnitsOfOneStep(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.clip(sum(r**n for n in range(K)), 1, K / 2 + 1).astype(self.kind)


@mutant("q-up-to-k", "clamps q at K in place of K/2 + 1", "EXT-04")
class QUpToK(Functional):
    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return np.clip(q, 1, K).astype(self.kind)


@mutant("q-without-floor", "lets q fall below 1, as it does for odd K and r < -1", "EXT-05")
class QWithoutFloor(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        q = sum(r**n for n in range(K)) / (1 + r)
        return np.where(np.abs(1 + r) <= 1e-8, super().scale(r, K), np.minimum(q, K / 2 + 1)).astype(self.kind)


@mutant("q-up-to-half-k", "clamps q at K/2", "EXT-04")
class QUpToHalfK(Functional):
    def bound(self, q: np.ndarray, K: int) -> np.ndarray:
        return np.clip(q, 1, K / 2).astype(self.kind)


@mutant(
    "pole-at-the-cap", "takes q at its cap at r = -1 where K is odd", "EXT-05", source="a constant in the denominator"
)
class PoleAtTheCap(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.where((K % 2 == 1) & (np.abs(1 + r) <= 1e-8), self.kind(K / 2 + 1), super().scale(r, K))


@mutant("pole-too-wide", "takes q = 1 wherever r is below -0.99, where K is odd", "EXT-05")
class PoleTooWide(Functional):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.where((K % 2 == 1) & (r < -0.99), self.kind(1), super().scale(r, K))


@mutant("negative-ratios-neutral", "takes q = 1 for every r below -0.9, even K too", "EXT-05")
class NegativeRatiosNeutral(InPlace):
    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return np.where(r < -0.9, self.kind(1), super().scale(r, K))


@mutant("short-horizons-taken", "takes a horizon of 1", "EXT-06")
class ShortHorizonsTaken(Functional):
    def refuse(self, config: Config) -> None:
        pass


@mutant("alpha-on-excess", "applies alpha to q - 1 in place of q", "MOV-01", "MOV-02")
class AlphaOnExcess(Functional):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        alpha = self.kind(self.config["alpha"])
        return {k: self.store(t + (1 + alpha * (q[k] - 1)) * (theta[2][k] - t)) for k, t in theta[0].items()}


@mutant("alpha-unused", "goes all the way to thetaK", "MOV-01", "MOV-02", "MOV-03", "INV-02")
class AlphaUnused(Functional):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return {k: self.store(t + q[k] * (theta[2][k] - t)) for k, t in theta[0].items()}


@mutant("alpha-off-by-a-percent", "takes 1 % too much of alpha", "MOV-01", "MOV-02", "INV-01", "INV-03")
class AlphaOffByAPercent(InPlace):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return super().move(theta, {k: v * self.kind(1.01) for k, v in q.items()})


@mutant("alpha-q-at-least-one", "never moves less than to theta2", "MOV-03", "INV-02")
class AlphaQAtLeastOne(Functional):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        least = 1 / max(self.config["alpha"], 1e-30)
        if self.config["alpha"] == 0:
            return {k: v.copy() for k, v in theta[2].items()}
        return super().move(theta, {k: np.maximum(v, self.kind(least)) for k, v in q.items()})


@mutant("move-from-theta1", "extrapolates the second step only, from theta1", "EXT-01", "MOV-01")
class MoveFromTheta1(InPlace):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return super().move([theta[1], theta[1], theta[2]], q)


@mutant(
    "move-by-gradients", "rebuilds the move from gradients, learning rate and weight decay, without momentum", "MOV-04"
)
class MoveByGradients(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        self.seen = g
        return super().scales(theta, g)

    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        o, (g0, g1) = self.config["optimizer"], self.seen
        lr, decay = self.kind(o["lr"]), self.kind(o["weight_decay"])
        theta2 = {k: t - lr * (g0[k] + g1[k] + decay * (t + theta[1][k])) for k, t in theta[0].items()}
        return super().move([theta[0], theta[1], theta2], q)


@mutant("no-move", "corrects from theta2", "EXT-01", "MOV-01", "MOV-02", "INV-02", "INV-03")
class NoMove(InPlace):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return {k: v.copy() for k, v in theta[2].items()}


@mutant("corrects-from-theta0", "takes the gradient at theta~ but steps from theta0", "COR-01")
class CorrectsFromTheta0(InPlace):
    def advance(self, g: Arrays) -> None:
        if getattr(self, "asked", 0) == 3:
            self.write(self.origin)
        super().advance(g)

    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == 1:
            self.origin = {k: v.copy() for k, v in point.items()}
        return super().ask(grad, point)

    def counted(self, outcome: str) -> None:
        self.asked = 0
        super().counted(outcome)

    def roll_back(self, before: tuple[Arrays, State]) -> None:
        self.asked = 0
        super().roll_back(before)


@mutant("corrective-averaged", "averages the corrective gradient with g0", "COR-01", "INV-02")
class CorrectiveAveraged(InPlace):
    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        self.count = 0
        return super().passes(grad, before)

    def advance(self, g: Arrays) -> None:
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3 and self.first is not None:
            g = {k: (v + self.first[0][k]) / 2 for k, v in g.items()}
        super().advance(g)


@mutant("no-corrective-step", "ends at theta~", "COR-01", "INV-04")
class NoCorrectiveStep(InPlace):
    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        self.count = 0
        return super().passes(grad, before)

    def advance(self, g: Arrays) -> None:
        self.count = getattr(self, "count", 0) + 1
        if self.count < 3:
            super().advance(g)


@mutant("k-gradients", "takes K + 1 gradients, the fast steps really made", "CST-01")
class KGradients(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        for _ in range(self.config["horizon"] - 2):
            self.ask(self.grad, self.theta)
        return made

    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        self.grad = grad
        return super().passes(grad, before)


@mutant("looks-once-more", "asks for the gradient at the end of each step, for its logs", "CST-01")
class LooksOnceMore(Functional):
    def outer(self, grad: Gradient) -> None:
        super().outer(grad)
        grad(self.params())


@mutant("two-gradients", "takes g1 for the corrective gradient, and asks for no third", "CST-01", "COR-01")
class TwoGradients(InPlace):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        self.given = [
            *getattr(self, "given", []),
            *([] if len(getattr(self, "given", [])) == 2 else [super().ask(grad, point)]),
        ]
        return self.given[-1]

    def counted(self, outcome: str) -> None:
        self.given = []
        super().counted(outcome)

    def roll_back(self, before: tuple[Arrays, State]) -> None:
        self.given = []
        super().roll_back(before)


@mutant("drifts-in-long-runs", "shortens its move by a little more with every step", "TOY-01", "TOY-02", "TOY-03")
class DriftsInLongRuns(Functional):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        share = self.kind(1 - 1e-3 * max(0, self.gate["step"] - 12))
        return super().move(theta, {k: v * share for k, v in q.items()})


@mutant("noise-in-the-last-bits", "adds noise of a few roundings to the move", "INV-10")
class NoiseInTheLastBits(Functional):
    rng = np.random.default_rng(0)

    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        u = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}[self.dtype]
        noise = {k: 1 + 2 * u * self.rng.standard_normal(v.shape) for k, v in q.items()}
        return {k: self.store(v * noise[k]) for k, v in super().move(theta, q).items()}


@mutant("scale-by-size", "takes more of the move in a larger tensor, (1 + 1e-3 log n)", "INV-08")
class ScaleBySize(InPlace):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return super().move(theta, {k: v * self.kind(1 + 1e-3 * math.log2(max(v.size, 4) / 4)) for k, v in q.items()})
