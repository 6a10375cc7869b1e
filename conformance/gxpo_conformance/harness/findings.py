"""Where a port parts from what is right: how near is near enough, what a finding says, whose fault it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.protocol import Arrays

PHASES = {
    "theta0": "theta0, the first point asked,",
    "theta1": "theta1, the second point asked,",
    "theta~": "theta~, the third point asked,",
    "theta'": "theta', the end of the step,",
}


@dataclass(frozen=True)
class Finding:
    """Where a port first parts from what is right. What a failure is not about is None."""

    text: str
    step: int | None = None  # number of the outer step in the case, from 0
    phase: str | None = None  # "theta0", "theta1", "theta~", "theta'", or "gradients asked"
    tensor: str | None = None
    coordinate: tuple[int, ...] | None = None
    got: float | None = None
    wanted: float | None = None
    budgets: float | None = None  # rounding budgets off; ALLOWED are allowed
    crash: bool = False  # it raised, died, hung or sent rubbish, in place of being wrong
    timed_out: bool = False
    run: str | None = None  # the awkward run that it was found in, by name


class Failure(Exception):
    """The port does not do what the clause says. `where` has Finding's fields."""

    def __init__(self, text: str, **where: Any) -> None:
        super().__init__(text)
        self.where = where

    def within(self, place: str, **where: Any) -> Failure:
        """The same failure, with the place it was found in."""
        return Failure(f"{place}: {self}", **self.where, **where)

    @property
    def finding(self) -> Finding:
        return Finding(str(self), **self.where)


class CaseError(Exception):
    """The suite's own case is unfit (too near a threshold, say): never the port's fault."""


class NeedsWindow(Exception):
    """A fixed case is about the window baseline, which the port does not have: its awkward runs show the clause."""


class Boom(Exception):
    """What the suite raises out of a gradient."""


class BoomRuntime(Boom, RuntimeError):
    """As running out of memory is, in most frameworks."""


class BoomValue(Boom, ValueError):
    """As a data set's complaint is."""


class BoomMemory(Boom, MemoryError):
    """As a CPU's is."""


class BoomStop(Boom, StopIteration):
    """As that of a data loader at its end."""


class BoomArithmetic(Boom, FloatingPointError):
    """As a framework's own look for NaN is."""


class OutOfTime(BaseException):
    """Raised into a port that computes past the limit; not an Exception, so that a port's `except` lets it pass."""


def to_dtype(values: Any, dtype: str) -> np.ndarray:
    """Rounded to `dtype`, as the array type that travels: float64, or float32 for float32 and bfloat16."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "float64":
        return values.copy()
    rounded = values.astype(np.float32)
    if dtype == "bfloat16":  # round to nearest, ties to even, on the upper 16 bits
        bits = rounded.view(np.uint32) if rounded.ndim else rounded.reshape(1).view(np.uint32)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        finite = np.isfinite(rounded)
        rounded = np.where(finite, kept.view(np.float32).reshape(rounded.shape), rounded)
    return np.asarray(rounded, dtype=np.float32)


def in_float64(arrays: Arrays) -> Arrays:
    """The same values, as the oracle and the toy problems take them."""
    return {k: v.astype(np.float64) for k, v in arrays.items()}


def require_arrays(arrays: Any, like: Arrays, what: str) -> Arrays:
    """Copies of `arrays`; Failure where names, shapes or dtypes are not those the session began with."""
    if not isinstance(arrays, dict) or arrays.keys() != like.keys():
        names = sorted(arrays) if isinstance(arrays, dict) else type(arrays).__name__
        raise Failure(f"{what} tensors {names}, not {sorted(like)}")
    for k, v in arrays.items():
        got, want = (np.shape(v), getattr(v, "dtype", type(v))), (like[k].shape, like[k].dtype)
        if got != want:
            raise Failure(f"{what} {k!r} of shape and dtype {got}, not {want}")
    return {k: np.array(arrays[k]) for k in like}  # in the order of `start`, whatever theirs


def require_close(got: Arrays, want: Arrays, budget: Arrays, phase: str) -> float:
    """Failure with the worst coordinate where `got` leaves `want` by more than ALLOWED budgets; else the most used.

    `phase`: one of PHASES, or words of the case's own.
    """
    worst, most, failure = ALLOWED, 0.0, None
    for k, w in want.items():
        g, b = got[k].astype(np.float64), budget[k]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.where(g == w, 0.0, np.abs(g - w) / b)
        off = np.where(np.isnan(g), np.inf, off)
        most = max(most, off.max(initial=0.0))
        if off.size and not off.max() <= worst:
            at = tuple(int(i) for i in np.unravel_index(np.argmax(off), off.shape))
            worst = float(off[at])
            place = f"{k}[{', '.join(map(str, at))}]" if at else k
            failure = Failure(
                f"{PHASES.get(phase, phase)} differs: {place} is {float(g[at])!r}, should be {float(w[at])!r}, "
                f"{worst:.3g} rounding budgets off ({ALLOWED:g} allowed)",
                phase=phase if phase in PHASES else None,
                tensor=k,
                coordinate=at,
                got=float(g[at]),
                wanted=float(w[at]),
                budgets=worst,
            )
    if failure:
        raise failure
    return float(most)


def require_same(got: Arrays, want: Arrays, phase: str) -> None:
    """Failure where `got` is not `want` exactly."""
    require_close(got, in_float64(want), {k: np.zeros(v.shape) for k, v in want.items()}, phase)
