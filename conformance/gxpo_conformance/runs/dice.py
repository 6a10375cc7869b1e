"""Random numbers that are the same on every machine and with every numpy: the raw bits of PCG64, keyed by a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Draws that depend on the key alone. (numpy promises the bits of a bit generator, not what Generator makes of
    them.)"""

    def __init__(self, *key: object) -> None:
        seed = hashlib.sha256(repr(key).encode()).digest()[:16]
        self.bits = np.random.PCG64(int.from_bytes(seed, "big"))

    def uniform(self, n: int) -> np.ndarray:
        """n numbers in [0, 1)."""
        return (np.asarray(self.bits.random_raw(n), dtype=np.uint64) >> np.uint64(11)) * 2.0**-53

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self.uniform(1)[0])

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
