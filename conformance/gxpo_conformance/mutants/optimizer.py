"""Mistakes in the optimizer and in what becomes of its state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Gradient

Settings = dict[str, Any]


@mutant("lr-off-by-a-percent", "steps with 1.01 times the learning rate", "OPT-01")
class LrOffByAPercent(Functional):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().sgd(theta, state, g, {**o, "lr": 1.01 * o["lr"]})


@mutant(
    "ascends", "adds the gradient in place of subtracting it", "OPT-01", source="a reward's gradient taken for a loss's"
)
class Ascends(InPlace):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        return super().sgd(theta, state, {k: -v for k, v in g.items()}, o)


@mutant("sgd-normalised", "steps along g / |g|", "OPT-01")
class SgdNormalised(InPlace):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        norm = self.norm(g) or 1.0
        return super().sgd(theta, state, {k: v / self.kind(norm) for k, v in g.items()}, o)


@mutant("nesterov", "uses Nesterov's momentum", "OPT-02")
class Nesterov(Functional):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        made, state = super().sgd(theta, state, g, o)
        mu, lr, decay = (self.kind(o[k]) for k in ("momentum", "lr", "weight_decay"))
        if not mu:
            return made, state
        return {k: self.store(t - lr * (g[k] + decay * t + mu * state["buffer"][k])) for k, t in theta.items()}, state


@mutant("momentum-dampened", "weighs the gradient by 1 - momentum", "OPT-02")
class MomentumDampened(InPlace):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        if o["momentum"]:
            share, decay = self.kind(1 - o["momentum"]), self.kind(o["weight_decay"])
            g = {k: share * v + (share - 1) * decay * theta[k] for k, v in g.items()}
        return super().sgd(theta, state, g, o)


@mutant("sgd-decay-decoupled", "decays the weights apart from momentum", "OPT-02")
class SgdDecayDecoupled(Functional):
    def sgd(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        keep = self.kind(1 - o["lr"] * o["weight_decay"])
        made, state = super().sgd(theta, state, g, {**o, "weight_decay": 0.0})
        return {k: self.store(v - (1 - keep) * theta[k]) for k, v in made.items()}, state


@mutant("adam-with-l2", "adds weight decay to AdamW's gradient", "OPT-03")
class AdamWithL2(Functional):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        g = {k: v + self.kind(o["weight_decay"]) * theta[k] for k, v in g.items()}
        return super().adamw(theta, state, g, {**o, "weight_decay": 0.0})


@mutant("adam-uncorrected", "leaves AdamW's bias correction out", "OPT-03")
class AdamUncorrected(InPlace):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        _, after = super().adamw(theta, state, g, o)
        keep, lr = 1 - o["lr"] * o["weight_decay"], o["lr"]
        moved = {k: lr * after["m"][k] / (np.sqrt(after["v"][k]) + o["eps"]) for k in theta}
        return {k: self.store(t * keep - moved[k]) for k, t in theta.items()}, after


@mutant("adam-eps-inside", "adds AdamW's eps under the root", "OPT-03")
class AdamEpsInside(Functional):
    def adamw(self, theta: Arrays, state: State, g: Arrays, o: Settings) -> tuple[Arrays, State]:
        _, after = super().adamw(theta, state, g, o)
        (b1, b2), n, keep = o["betas"], after["n"], 1 - o["lr"] * o["weight_decay"]
        root = {k: np.sqrt(v / (1 - b2**n) + o["eps"]) for k, v in after["v"].items()}
        step = {k: o["lr"] / (1 - b1**n) * m / root[k] for k, m in after["m"].items()}
        return {k: self.store(t * keep - step[k]) for k, t in theta.items()}, after


@mutant("keep-that-restores", "goes on from s0 whatever policy is asked for", "OPT-04", "OPT-06")
class KeepThatRestores(Functional):
    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        return s0


@mutant(
    "restore-that-keeps",
    "lets the fast steps leak into the optimizer's state under restore",
    "OPT-05",
    "OPT-06",
    source="wrappers that copy parameters and forget the state",
)
class RestoreThatKeeps(InPlace):
    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        return s2


@mutant("restore-from-s1", "goes on from s1 under restore", "OPT-05", "OPT-06")
class RestoreFromS1(InPlace):
    def advance(self, g: Arrays) -> None:
        super().advance(g)
        self.states = [*getattr(self, "states", []), self.state][-2:]

    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        return s2 if self.config["optimizer_state"] == "keep" else self.states[0]


@mutant("step-count-leaks", "restores AdamW's moments but not its step count", "OPT-06")
class StepCountLeaks(Functional):
    def state_of_the_last_step(self, s0: State, s2: State) -> State:
        s = super().state_of_the_last_step(s0, s2)
        if "n" not in s2 or s is s2:
            return s
        zeros = {k: np.zeros_like(v) for k, v in s2["m"].items()}
        return {"m": zeros, "v": zeros, **s, "n": s2["n"]}


@mutant("state-reset-each-step", "starts every step with a fresh optimizer", "OPT-02", "OPT-06")
class StateResetEachStep(Functional):
    def outer(self, grad: Gradient) -> None:
        self.state = {}
        super().outer(grad)


@mutant("single-pass-twice", "steps twice with g0 in a single pass", "GAT-08", "NUM-01")
class SinglePassTwice(Functional):
    def counted(self, outcome: str) -> None:
        if outcome == "single":
            self.theta, self.state = self.update(self.theta, self.state, self.latest)
        super().counted(outcome)

    def clip(self, g: Arrays, norm: float) -> Arrays:
        self.latest = super().clip(g, norm)
        return self.latest


@mutant("fallback-moves-by-alpha", "scales the single pass by alpha", "GAT-08")
class FallbackMovesByAlpha(InPlace):
    def passes(self, grad: Gradient, before: tuple[Arrays, State]) -> str:
        outcome = super().passes(grad, before)
        if outcome == "single":
            alpha = self.kind(self.config["alpha"] * 0.5)
            self.write({k: t + alpha * (self.theta[k] - t) for k, t in before[0].items()})
        return outcome


@mutant(
    "zero-gradient-skipped", "makes no step where the gradient is zero, momentum and weight decay forgotten", "NUM-01"
)
class ZeroGradientSkipped(Functional):
    def outer(self, grad: Gradient) -> None:
        theta, state = self.theta, self.state
        norms: list[float] = []

        def seen(point: Arrays) -> tuple[float, Arrays]:
            loss, g = grad(point)
            norms.append(self.norm(g))
            return loss, g

        super().outer(seen)
        if norms[0] == 0:
            self.theta, self.state = theta, state


@mutant("zero-gradient-is-active", "extrapolates from a zero gradient like from any other", "NUM-01")
class ZeroGradientIsActive(InPlace):
    def norm(self, g: Arrays) -> float:
        return super().norm(g) or math.ulp(0.0)
