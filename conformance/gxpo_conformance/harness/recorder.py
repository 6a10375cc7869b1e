"""What a port is given for a gradient, and what it asked: the record that everything is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gxpo_conformance.harness.findings import Boom, Failure, in_float64, require_arrays, to_dtype
from gxpo_conformance.protocol import Arrays, Gradient

MOST_ASKED = 12  # in one step; a port that goes on asking is stopped
OWN = "the suite's own exception"
Script = Sequence[Arrays]  # the gradients of one step: the i-th call gets the i-th; a further call gets the first again
Source = Script | Gradient


@dataclass
class Recorder:
    """The gradient as the port sees it; keeps copies of what was asked and given."""

    source: Source
    dtype: str
    like: Arrays
    losses: Sequence[float] | None = None
    raise_at: int | None = None
    raise_what: type[BaseException] = Boom
    statistic: float | None = None  # what the caller hands in, where the gate watches that
    untidy: bool = False
    scribble: bool = False  # writes into the arrays that it was asked at
    asked: list[Arrays] = field(default_factory=list)
    given: list[tuple[float, Arrays]] = field(default_factory=list)
    failure: Failure | None = None  # raised into the port, which may have swallowed it

    def __call__(self, params: Arrays) -> tuple[float, Arrays]:
        i = len(self.asked)
        try:
            if i >= MOST_ASKED:
                raise Failure(
                    f"the port asked for more than {MOST_ASKED} gradients in one step", phase="gradients asked"
                )
            self.asked.append(require_arrays(params, self.like, f"the port asked for a gradient (call {i + 1}) at"))
        except Failure as failure:
            self.failure = failure
            raise
        if self.scribble:
            for array in params.values():
                if array.flags.writeable:
                    array[...] = np.nan
        if i == self.raise_at:
            raise self.raise_what(f"{OWN}, raised out of gradient {i + 1}")
        loss, grads = self.answer(i, self.asked[-1])
        self.given.append((loss, grads))
        if self.untidy:  # by name all the same: in the other memory layout, and not in one order throughout a step
            names = reversed(grads) if i else iter(grads)
            return loss, {k: np.array(grads[k], order="F") for k in names}
        return loss, {k: g.copy() for k, g in grads.items()}

    def answer(self, i: int, params: Arrays) -> tuple[float, Arrays]:
        if any(not np.isfinite([loss, *(g.sum() for g in grads.values())]).all() for loss, grads in self.given):
            i = 0  # a failed pass sends the port back to theta0
        elif self.given and not any(g.any() for g in self.given[0][1].values()):
            i = 0  # so does a zero gradient, where it asks once more
        if callable(self.source):
            loss, grads = self.source(in_float64(params))
        else:
            loss, grads = 0.5, self.source[i if i < len(self.source) else 0]
        if self.losses is not None and i < len(self.losses):
            loss = self.losses[i]
        return float(loss), {k: to_dtype(g, self.dtype) for k, g in grads.items()}

    def replay(self) -> Gradient:
        """The same answers for the oracle: what was given, and what would have been given to whoever asks on."""
        calls = iter(range(MOST_ASKED + 1))

        def answer(params: Arrays) -> tuple[float, Arrays]:
            i = next(calls)
            loss, grads = self.given[i] if i < len(self.given) else self.answer(i, params)
            return loss, in_float64(grads)

        return answer
