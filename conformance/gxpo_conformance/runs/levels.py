"""What an awkward run may vary: factors and their levels, and arrays of them that cover every pair.

The first level of a factor is the simplest: what a port that lacks an option gets in its place, and what a failing run
is shrunk to.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

from gxpo_conformance.protocol import declares
from gxpo_conformance.runs.dice import Dice

Levels = dict[str, Any]

FACTORS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd", "momentum", "adamw"),
    "decay": (False, True),
    "numbers": ("usual", "odd"),  # hyperparameters that people use, or any
    "policy": ("keep", "restore"),
    "estimator": ("gradient", "displacement", "tensor"),
    "horizon": (5, 2, 3, 4, 6, 7, 10, 20, 33, 80),
    "alpha": (1.0, 0.8, 0.5, 0.3, 0.1, 0.0),
    "clip": ("off", "all", "some", "at", "loose"),  # which norms are above C; "at": that of the first gradient is C
    "statistic": ("corrective_norm", "initial_norm", "disagreement", "supplied", "never"),
    "baseline": ("window", "ema"),
    "window": (3, 2, 4, 5),
    "threshold": (2.0, 3.0, 1.3, 0.6),
    "patience": (1, 2, 3),
    "two_sided": (False, True),
    "warmup": (0, 1, 2, 3),
    "cooldown": (None, 0, 1, 2, 3),
    "max_active_steps": (None, 0, 1, 2, 4, 6),
    "sizes": ("few", "one", "scalar", "several", "empty", "hundreds", "thousands"),
    "scale": ("unit", "small", "tiny", "mixed", "large", "huge", "vast"),
    "start": ("zero", "near"),  # where the parameters are
    "ratios": ("any", "one", "beyond", "low"),  # what coordinates keep of their gradient
}

# What a port has to declare for a level other than the first.
NEEDS: dict[str, str] = {
    "optimizer": "optimizers:{}",
    "estimator": "estimators:{}",
    "policy": "optimizer_state:{}",
    "clip": "max_grad_norm",
    "statistic": "gate_statistics:{}",
    "baseline": "gate_baselines:{}",
    **{name: f"gate_options:{name}" for name in ("patience", "two_sided", "warmup", "cooldown", "max_active_steps")},
}
SIMPLEST = {name: levels[0] for name, levels in FACTORS.items()}


def has(capabilities: dict[str, Any], factor: str, level: Any) -> bool:
    """Whether a port declares what this level needs."""
    if factor not in NEEDS or (factor == "optimizer" and level in ("sgd", "momentum")):
        return True
    if factor not in ("policy", "baseline") and level == FACTORS[factor][0]:
        return True
    return declares(capabilities, NEEDS[factor].format(level))


def fitted(levels: Mapping[str, Any], capabilities: dict[str, Any], dtype: str) -> Levels:
    """`levels` with the simplest that the port has in place of those that it lacks, or that its dtype cannot show."""
    made = {**SIMPLEST, **levels}
    for factor, level in made.items():
        if not has(capabilities, factor, level):
            made[factor] = next(other for other in FACTORS[factor] if has(capabilities, factor, other))
    if made["scale"] == "vast" and dtype != "float64":  # beyond what float32 holds
        made["scale"] = "huge"
    if dtype == "bfloat16":  # displacements mostly round away (SPEC.md, Budgets)
        if made["estimator"] == "displacement":
            made["estimator"] = "gradient"
        if made["estimator"] == "tensor":
            made |= {"optimizer": "sgd", "decay": False}
        made |= {"start": "zero", "horizon": min(made["horizon"], 10)}
        if made["scale"] == "mixed":
            made["scale"] = "unit"
    if made["baseline"] == "ema" and made["statistic"] != "disagreement" and made["scale"] != "unit":
        made["scale"] = "unit"  # its mean and variance start at 1
    return made


@functools.cache
def covering(key: str, vary: tuple[tuple[str, tuple[Any, ...]], ...], most: int) -> tuple[Levels, ...]:
    """Rows in which every pair of levels of two of the factors occurs, greedily, the `most` that cover most.

    Each row is the best of some random ones; a library does the same with fewer rows, but the suite has to do without.
    """
    dice, names = Dice("covering", key), [name for name, _ in vary]
    among = dict(vary)
    left = {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(names, 2) for x in among[a] for y in among[b]
    }
    rows: list[Levels] = []

    def gain(row: Levels) -> int:
        return sum(frozenset(pair) in left for pair in itertools.combinations(row.items(), 2))

    used = {(name, level): 0 for name in names for level in among[name]}

    def drawn() -> Levels:
        """A row of levels that have been used least, so that none is left out."""
        least = {name: min(used[name, level] for level in among[name]) for name in names}
        return {name: dice.choice([x for x in among[name] if used[name, x] == least[name]]) for name in names}

    while len(rows) < most and left:
        row = max((drawn() for _ in range(10)), key=gain)
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        for item in row.items():
            used[item] += 1
        rows.append(row)
    return tuple(rows)
