"""From curves to figures: when a level was reached, at what price, and how many times cheaper than GRPO.

Two definitions of a speedup stand side by side. The paper's: GRPO's steps to its own highest accuracy, over the rule's
steps to that accuracy. Ours: the same to 95 % of the peak of GRPO's smoothed curve, for a peak near saturation is a
matter of luck. What never gets there is "never", and counts as a speedup of 0 in medians and quartiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SMOOTH = 9  # steps
LEVEL = 0.95
NEVER = float("inf")


def smoothed(accuracy: np.ndarray) -> np.ndarray:
    """Moving mean over SMOOTH steps along the last axis, over fewer at both ends."""
    half, n = SMOOTH // 2, accuracy.shape[-1]
    sums = np.concatenate([np.zeros((*accuracy.shape[:-1], 1)), np.cumsum(accuracy, axis=-1)], axis=-1)
    low, high = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
    return (sums[..., high] - sums[..., low]) / (high - low)


def mean_accuracy(accuracy: np.ndarray) -> np.ndarray:
    """Over all steps: the area under the curve, which a late peak cannot make up for."""
    return accuracy.mean(axis=-1)


def first_at(curve: np.ndarray, level: float) -> float:
    """The first step at which `curve` is at least `level`; NEVER."""
    at = np.flatnonzero(curve >= level)
    return float(at[0]) if at.size else NEVER


@dataclass(frozen=True)
class Price:
    """What it took to get to a level. All NEVER where it was not reached."""

    steps: float
    passes: float
    update: float  # seconds of gradients and updates
    seconds: float  # with rollouts


def price(steps: float, passes: list[int], seconds: dict[str, float]) -> Price:
    """seconds: measured, of a whole batch of runs; a pass and a rollout of one rule cost the same in all its steps."""
    if steps == NEVER:
        return Price(NEVER, NEVER, NEVER, NEVER)
    made = passes[int(steps)]
    update = seconds["update"] * made / max(passes[-1], 1)
    return Price(steps, float(made), update, update + seconds["rollouts"] * steps / (len(passes) - 1))


def times(grpo: float, rule: float) -> float:
    """How many times less `rule` needs than `grpo` does."""
    if rule == NEVER:
        return 0.0
    return max(grpo, 1.0) / max(rule, 1.0) if grpo != NEVER else NEVER


@dataclass(frozen=True)
class Speedup:
    """Of every seed: how many times less than GRPO."""

    steps: np.ndarray
    passes: np.ndarray
    update: np.ndarray
    seconds: np.ndarray
    paper: np.ndarray  # steps, by the paper's definition


def rows(cell: dict[str, Any], lr: float) -> list[int]:
    """The runs of `cell` at rate `lr`."""
    at, n = cell["lrs"].index(lr), len(cell["seeds"])
    return list(range(at * n, (at + 1) * n))


def speedup(grpo: dict[str, Any], rule: dict[str, Any], grpo_lr: float, rule_lr: float) -> Speedup:
    """Seed by seed, at these rates."""
    found: list[tuple[float, ...]] = []
    for g, r in zip(rows(grpo, grpo_lr), rows(rule, rule_lr), strict=True):
        plain, other = (np.array(cell["accuracy"][row]) for cell, row in ((grpo, g), (rule, r)))
        level = LEVEL * smoothed(plain).max()
        one = price(first_at(smoothed(plain), level), grpo["passes"][g], grpo["seconds"])
        two = price(first_at(smoothed(other), level), rule["passes"][r], rule["seconds"])
        seconds = [(a, b) for a, b in ((one.update, two.update), (one.seconds, two.seconds))]
        ratio = [0.0 if b == NEVER else a / max(b, 1e-12) for a, b in seconds]
        paper = times(first_at(plain, plain.max()), first_at(other, plain.max()))
        found.append((times(one.steps, two.steps), times(one.passes, two.passes), *ratio, paper))
    return Speedup(*np.array(found).T)


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """(25 %, median, 75 %)"""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)
