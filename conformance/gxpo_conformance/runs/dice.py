"""Random numbers that are the same on every machine and with every numpy, keyed by a text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Draws that depend on the key alone."""

    def __init__(self, *key: object) -> None:
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "big")
        self.one = random.Random(seed)  # its random() is promised to stay as it is
        self.bits = np.random.PCG64(seed)  # so are the bits, but not what numpy's Generator makes of them

    def uniform(self, n: int) -> np.ndarray:
        """n numbers in [0, 1)."""
        return (np.asarray(self.bits.random_raw(n), dtype=np.uint64) >> np.uint64(11)) * 2.0**-53

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self.one.random()

    def chance(self, p: float) -> bool:
        return self.number() < p

    def choice(self, among: Sequence[T]) -> T:
        return among[int(self.number() * len(among))]

    def weighted(self, among: dict[T, float]) -> T:
        at = self.number() * sum(among.values())
        for item, weight in among.items():
            at -= weight
            if at < 0:
                return item
        return next(reversed(among))

    def each(self, n: int, among: Sequence[float]) -> np.ndarray:
        """n of them, with repetition."""
        return np.asarray(among)[(self.uniform(n) * len(among)).astype(int)]
