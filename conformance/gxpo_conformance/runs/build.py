"""From levels and a seed to an awkward run: configuration, parameters, and the gradients of every step.

The oracle runs ahead, so that each step can be aimed: its observation lies a tenth on this side of the gate's
threshold or on that one, a coordinate's share of the RMS a fifth away from the bound. What rounding alone could decide
is drawn again.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gxpo_conformance.harness.budget import UNIT_ROUNDOFF
from gxpo_conformance.harness.findings import (
    Boom,
    BoomArithmetic,
    BoomMemory,
    BoomRuntime,
    BoomStop,
    BoomValue,
    in_float64,
    to_dtype,
)
from gxpo_conformance.harness.recorder import Recorder
from gxpo_conformance.protocol import Arrays, Config, config
from gxpo_conformance.runs.dice import Dice
from gxpo_conformance.runs.levels import Levels
from gxpo_reference.oracle import Oracle, Trace
from gxpo_reference.oracle_gate import observe

SIZES: dict[str, list[tuple[tuple[int, ...], ...]]] = {
    "few": [((4,), (2, 3)), ((5,),), ((3,), (2, 2), (1,))],
    "one": [((1,),), ((2,),)],
    "scalar": [((), (3,)), ((2,), ())],
    "several": [((2,), (7,), (3, 2), (1, 1, 4)), ((3,), (), (2, 5), (6,), (1,))],
    "empty": [((3,), (0,)), ((0, 4), (2, 2), (3,))],
    "hundreds": [((257,), (3,)), ((9, 33),)],
    "thousands": [((6001,),), ((5,), (1030, 2))],
}
NAMES = ("w", "layers.0.weight", "layers.0.bias", "layers.1.weight", "norm.bias")
SCALES = {"unit": 0, "small": -10, "tiny": -22, "mixed": 0, "large": 9, "huge": 30, "vast": 200}  # exponents of two
SHARES = (0.5e-3, 0.8e-3, 1.25e-3, 4e-3)  # of the tensor's RMS, about the activity bound
USUAL: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8},
}
# Where the next observation is to lie: z as a share of the threshold.
TARGETS = {"calm": (-0.3, 0.3), "below": (0.86, 0.92), "above": (1.08, 1.15), "far": (2.0, 6.0)}
TARGETS |= {"low": (-1.15, -1.08), "not so low": (-0.92, -0.86)}
BAD = (math.nan, math.inf, -math.inf)
RAISED: tuple[type[BaseException], ...] = (
    Boom,
    BoomRuntime,
    BoomValue,
    BoomMemory,
    BoomStop,
    BoomArithmetic,
)
TRIES = 6  # to draw a step that rounding cannot decide


@dataclass(frozen=True)
class Event:
    """One step to be made. `odd`: what is odd about it, if anything, in gradient `at` (from 0)."""

    key: int  # of its own dice, so that a run without its neighbours has the same numbers
    target: str = "calm"
    odd: str = ""  # "zero", "gradient", "loss", "zero and loss", "raise", "interrupt", "resume"
    at: int = 0


@dataclass(frozen=True)
class Step:
    """One outer step as it is put to a port."""

    script: list[Arrays]
    losses: list[float]
    event: Event
    statistic: float | None
    raises: type[BaseException]


@dataclass(frozen=True)
class Plan:
    config: Config
    start: Arrays
    steps: tuple[Step, ...]


def settings(levels: Levels, dice: Dice) -> Config:
    """A whole configuration. "usual" numbers are what people write, "odd" ones are no power of two, nor is 1 - x."""
    odd = levels["numbers"] == "odd"
    optimizer = dict(USUAL[levels["optimizer"]])
    if odd:
        optimizer["lr"] = round(optimizer["lr"] * 2 ** dice.number(-2, 2), 6)
        if "momentum" in optimizer:
            optimizer["momentum"] = round(dice.number(0.3, 0.95), 3)
        if "betas" in optimizer:
            first = 0.0 if dice.chance(0.15) else round(dice.number(0.3, 0.95), 3)
            optimizer["betas"] = [first, round(dice.number(0.55, 0.997), 4)]
            optimizer["eps"] = dice.choice([1e-8, 1e-3, 0.1])
    if levels["decay"]:
        optimizer["weight_decay"] = round(dice.number(0.05, 0.4), 3) if odd else 0.01
    elif levels["optimizer"] == "sgd":
        optimizer["lr"] *= 2.0 ** -SCALES[levels["scale"]]
    gate = {k: levels[k] for k in ("statistic", "baseline", "window", "threshold", "patience", "two_sided")}
    gate |= {k: levels[k] for k in ("warmup", "cooldown", "max_active_steps")}
    gate["omega"] = (round(dice.number(0.05, 0.6), 3) if dice.chance(0.93) else 1.0) if odd else 0.1
    if odd:
        gate["threshold"] = round(levels["threshold"] * dice.number(0.9, 1.2), 3)
    return config(
        horizon=levels["horizon"],
        alpha=levels["alpha"],
        estimator=levels["estimator"],
        optimizer_state=levels["policy"],
        gate=gate,
        optimizer=optimizer,
    )


class Builder:
    """Makes the steps of one run, the oracle beside it."""

    def __init__(self, levels: Levels, seed: str, dtype: str) -> None:
        dice = Dice(seed, "run")
        self.levels, self.seed, self.dtype = levels, seed, dtype
        self.shapes = dict(zip(NAMES, dice.choice(SIZES[levels["sizes"]]), strict=False))
        if levels["sizes"] == "several" and dice.chance(0.5):  # the order of names is not the alphabet's
            self.shapes = dict(zip(reversed([*self.shapes]), self.shapes.values(), strict=True))
        unit = 2.0 ** SCALES[levels["scale"]]
        mixed = levels["scale"] == "mixed"
        self.large = next(k for k, shape in self.shapes.items() if math.prod(shape))  # never tiny, so nor is the norm
        self.units = {
            k: unit * (2.0 ** dice.choice([-34, -20, -8, 6]) if mixed and k != self.large else 1.0) for k in self.shapes
        }
        self.made = settings(levels, dice)
        self.base = self.usual_norm() * dice.number(0.7, 1.4)  # the norm that gradients have where no gate is aimed at
        if levels["clip"] != "off":
            share = {"all": 0.2, "some": 1.0, "at": 1.0, "loose": 40.0}[levels["clip"]]
            self.made["max_grad_norm"] = float(f"{share * self.base:.3g}")
            if levels["clip"] == "at":  # within the 1e-6 of the formula, above the norm
                self.made["max_grad_norm"] = self.base * (1 + 1e-7)
        start = {k: np.zeros(s) for k, s in self.shapes.items()}
        if levels["start"] == "near":  # near enough that float32 still sees the steps
            size = 3.0 * self.made["optimizer"]["lr"] * (1.0 if levels["optimizer"] == "adamw" else unit)
            start = {k: (dice.uniform(math.prod(s)) * 2 - 1).reshape(s) * size for k, s in self.shapes.items()}
        self.start = {k: to_dtype(v, dtype) for k, v in start.items()}
        self.oracle = Oracle(in_float64(self.start), self.made)
        self.steps: list[Step] = []

    def usual_norm(self) -> float:
        return math.sqrt(sum(math.prod(s) * self.units[k] ** 2 for k, s in self.shapes.items()))

    # -- arrays

    def arrays(self, dice: Dice) -> Arrays:
        """Magnitudes within a factor of eight of the tensor's unit, and signs."""
        made = {}
        for k, shape in self.shapes.items():
            n = math.prod(shape)
            values = 2.0 ** (dice.uniform(n) * 3 - 1.5) * dice.each(n, (-1.0, 1.0)) * self.units[k]
            made[k] = values.reshape(shape)
        return made

    def first(self, dice: Dice) -> Arrays:
        """g0: with zeros, and with coordinates about the activity bound."""
        made = self.arrays(dice)
        for k, a in made.items():
            flat = a.reshape(-1)
            if flat.size > 64 and dice.chance(0.6):  # parts of it are small, as a block or the tail may be
                part = dice.choice([64, 512, 1024, flat.size // 2 + 1])
                parts = 2.0 ** -np.floor(dice.uniform(1 + flat.size // part) * 13)
                flat *= np.repeat(parts, part)[: flat.size]
            if flat.size > 2 and dice.chance(0.6):
                rms = float(np.sqrt(np.mean(flat**2)))
                for _ in range(1 + flat.size // 200):
                    at = int(dice.number() * flat.size)
                    flat[at] = math.copysign(dice.choice(SHARES) * rms, flat[at])
            if flat.size > 1 and dice.chance(0.5):
                flat[dice.uniform(flat.size) < 0.15] = 0.0
            if len(made) > 1 and dice.chance(0.07) and k != self.large:
                flat[:] = 0.0
        if not any(a.any() for a in made.values()):  # a zero gradient is another matter
            made[self.large].reshape(-1)[0] = self.units[self.large]
        return made

    def second(self, dice: Dice, g0: Arrays) -> Arrays:
        """g1 = r g0; where g0 is zero, anything."""
        made, odd = {}, self.made["horizon"] % 2 == 1
        for k, g in g0.items():
            u = dice.uniform(g.size)
            kind = dice.uniform(g.size)
            r = u * 2.6 - 0.8  # from -0.8 to 1.8
            ratios = self.levels["ratios"]
            one, beyond, low = {
                "any": (0.15, 0.1, 0.1),
                "one": (0.9, 0, 0),
                "beyond": (0.1, 0.8, 0),
                "low": (0, 0, 0.8),
            }[ratios]
            r = np.where(kind < one, 1 + (u - 0.5) * 10.0 ** np.round(-4 * dice.uniform(g.size)), r)
            r = np.where((kind >= one) & (kind < one + beyond), 1.5 + 6 * u, r)
            r = np.where((kind >= 1 - low), -0.4 - 3.0 * u, r)
            if odd:  # 1 + r is a pole there: EXT-05 stands on it, these runs do not
                r = np.where(np.abs(1 + r) < 0.08, -0.85, r)
            r = np.where(kind == kind.max(initial=-1), 0.0, r) if g.size > 3 else r
            fresh = (dice.uniform(g.size) * 2 - 1) * self.units[k]
            made[k] = np.where(g.reshape(-1) == 0, fresh * (dice.uniform(g.size) < 0.5), r * g.reshape(-1)).reshape(
                g.shape
            )
        return made

    # -- the gate

    def wanted(self, dice: Dice, event: Event) -> float | None:
        """What the gate is to observe in this step; None where it does not matter."""
        rules = self.made["gate"]
        if rules["statistic"] == "never":
            return None
        baseline = observe(self.oracle.gate, rules, 0, 0.0)[1]["baseline"]
        turning = rules["statistic"] == "disagreement"
        if baseline is None:
            if turning:
                return dice.number(0.2, 0.6)
            return self.base * (dice.number(0.6, 1.6) if event.target in ("calm", "below") else dice.number(1, 8))
        low, high = TARGETS[event.target]
        h = baseline[0] + rules["threshold"] * dice.number(low, high) * (baseline[1] + 1e-9)
        if rules["statistic"] == "supplied":
            return float(f"{h:.6g}")
        least, most = (0.02, 0.98) if turning else (0.05 * self.base, math.inf)
        return h if least <= h <= most else baseline[0] + 0.4 * rules["threshold"] * dice.number(-1, 1) * baseline[1]

    def aimed(self, dice: Dice, event: Event) -> tuple[list[Arrays], float | None]:
        """Three gradients whose observation is the wanted one."""
        h, kind = self.wanted(dice, event), self.made["gate"]["statistic"]
        g0 = self.first(dice)
        size = norm(g0)
        ratio = (h if kind == "initial_norm" and h else self.base * dice.number(0.4, 2.0)) / (size or 1.0)
        if self.levels["clip"] == "at" and kind != "initial_norm" and not self.steps:
            ratio = self.base / (size or 1.0)
        g0 = {k: g * ratio for k, g in g0.items()}
        g1, last = self.second(dice, g0), self.arrays(dice)
        if kind == "disagreement" and h is not None:
            last = turned(g0, last, h, dice)
        elif h is not None and kind == "corrective_norm":
            last = scaled(last, h)
        else:
            last = scaled(last, self.base * dice.number(0.3, 3.0))
        return [g0, g1, last], h if kind == "supplied" else None

    # -- steps

    def draw(self, event: Event, attempt: int) -> Step:
        dice = Dice(self.seed, "step", event.key, attempt)
        script, statistic = self.aimed(dice, event)
        losses = [dice.choice([0.0, 0.5, -1.25, 1e-9, 3e4]) for _ in range(3)]
        if event.odd.startswith("zero"):
            script[event.at] = {k: np.zeros(s) for k, s in self.shapes.items()}
        elif event.odd == "gradient":
            at = [k for k, g in script[event.at].items() if g.size]
            k = dice.choice([at[0], at[-1], dice.choice(at)])
            flat = script[event.at][k].reshape(-1)
            flat[dice.choice([0, flat.size - 1, int(dice.number() * flat.size)])] = dice.choice(BAD)
        if event.odd.endswith("loss"):
            losses[event.at] = dice.choice(BAD)
        script = [{k: to_dtype(v, self.dtype) for k, v in g.items()} for g in script]
        if self.made["gate"]["statistic"] == "supplied" and statistic is None:
            statistic = 1.0
        raises = KeyboardInterrupt if event.odd == "interrupt" else dice.choice(RAISED)
        return Step(script, losses, event, statistic, raises)

    def add(self, event: Event) -> None:
        """The step of `event`, unless rounding would decide it whatever is drawn."""
        for attempt in range(TRIES):
            step, ahead = self.draw(event, attempt), copy.copy(self.oracle)
            recorder = Recorder(step.script, self.dtype, self.start, step.losses)
            trace = ahead.step(recorder.replay(), step.statistic)
            if fit(trace, self.made, self.dtype):
                break
        else:
            return
        if event.odd in ("raise", "interrupt"):
            if trace.passes > event.at:
                self.steps.append(step)
            return
        self.steps.append(step)
        self.oracle = ahead


def norm(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.sum(a * a)) for a in arrays.values()))


def scaled(arrays: Arrays, to: float) -> Arrays:
    size = norm(arrays)
    return {k: a * (to / size) for k, a in arrays.items()} if size else arrays


def turned(g0: Arrays, last: Arrays, h: float, dice: Dice) -> Arrays:
    """A gradient with 1 - abs(cos(g0, .)) = h: along g0 and across it."""
    size = norm(g0)
    if not size:
        return last
    along = sum(float(np.sum(g0[k] * last[k])) for k in g0) / size**2
    across = {k: last[k] - along * g0[k] for k in g0}
    if norm(across) < 1e-6 * norm(last):  # one coordinate: nothing is across
        return last
    cosine = (1 - min(max(h, 0.01), 0.99)) * dice.choice([-1.0, 1.0])
    sine = math.sqrt(1 - cosine**2)
    made = {k: cosine * g0[k] / size + sine * across[k] / norm(across) for k in g0}
    return scaled(made, size * dice.number(0.3, 3.0))


def fit(trace: Trace, made: Config, dtype: str) -> bool:
    """Whether this step is far from anything that rounding could turn the other way."""
    u, gate = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"], made["gate"]
    if trace.baseline is not None and trace.statistic is not None:
        (mu, sigma), h = trace.baseline, trace.statistic
        n = sum(g.size for g in trace.grads[0].values())
        off = (64 + n) * u * max(abs(mu), abs(h), 1.0 if gate["statistic"] == "disagreement" else 0.0)
        away = abs(h - mu)
        least, most = max(away - off, 0.0) / (sigma + off + 1e-9), (away + off) / (max(sigma - off, 0.0) + 1e-9)
        if least < 1.02 * gate["threshold"] and most > 0.98 * gate["threshold"]:
            return False
    if trace.q is None or trace.takes_part is None or trace.r is None:
        return True
    u = UNIT_ROUNDOFF[dtype]
    for k, theta0 in trace.points["theta0"].items():
        theta1, theta2 = trace.points["theta1"][k], trace.points["theta2"][k]
        if made["estimator"] == "gradient":
            before = np.abs(trace.clips[0] * trace.grads[0][k])
        else:
            before = np.abs(theta1 - theta0)
            noise = u * (32 * np.maximum(np.abs(theta0), np.abs(theta1)) + 64 * before)
            moved = np.maximum(before, np.abs(theta2 - theta1))
            if made["estimator"] == "tensor":
                if before.any() and np.sum(noise * moved) > 0.01 * np.sum(before * before):
                    return False
                continue
            if (trace.takes_part[k] & (noise > 0.01 * before)).any():
                return False
        if before.size:
            bound = 1e-3 * np.sqrt(np.mean(before**2))
            if ((before > 0.93 * bound) & (before < 1.07 * bound) & (before > 0)).any():
                return False
        r = trace.r[k]
        if made["horizon"] % 2 and (trace.takes_part[k] & (np.abs(1 + r) < 0.03)).any():
            return False
    return True


@functools.lru_cache(maxsize=4096)
def cached(levels: tuple[tuple[str, Any], ...], events: tuple[Event, ...], seed: str, dtype: str) -> Plan:
    builder = Builder(dict(levels), seed, dtype)
    for event in events:
        builder.add(event)
    return Plan(builder.made, builder.start, tuple(builder.steps))


def build(levels: Levels, events: tuple[Event, ...], seed: str, dtype: str) -> Plan:
    """The same plan for the same arguments; some of the events may have no step in it."""
    return cached(tuple(levels.items()), events, seed, dtype)
