"""Mistakes with shapes, names, arrays that are shared, and sessions that are."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Config


@mutant("scalars-left-out", "does not extrapolate tensors without dimensions", "DEV-01")
class ScalarsLeftOut(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        return {k: q if np.ndim(q) else np.ones_like(q) for k, q in super().scales(theta, g).items()}


@mutant("rows-apart", "takes the RMS of each row of a matrix", "EST-02")
class RowsApart(InPlace):
    def active(self, before: np.ndarray) -> np.ndarray:
        if before.ndim < 2:
            return super().active(before)
        rms = np.sqrt(np.mean(before * before, axis=tuple(range(1, before.ndim)), keepdims=True))
        return np.abs(before) > 1e-3 * rms


@mutant("transposed", "reads matrices column by column when it moves", "DEV-01")
class Transposed(Functional):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        return super().move(theta, {k: np.ravel(v, order="F").reshape(v.shape) for k, v in q.items()})


@mutant("first-tensor-only", "extrapolates the first tensor only", "EST-01", "DEV-01")
class FirstTensorOnly(InPlace):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        first = next(iter(made))
        return {k: q if k == first else np.ones_like(q) for k, q in made.items()}


@mutant("params-are-live", "hands out its own arrays", "DEV-02")
class ParamsAreLive(InPlace):
    def params(self) -> Arrays:
        return self.theta


@mutant("gradients-by-order", "pairs gradients with parameters by the order of their names", "INV-07")
class GradientsByOrder(Functional):
    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        made = super().scales(theta, g)
        by_name = [made[k] for k in sorted(made)]
        if any(a.shape != b.shape for a, b in zip(made.values(), by_name, strict=True)):
            return made
        return dict(zip(made, by_name, strict=True))


@mutant("position-matters", "weighs a tensor's coordinates by where they stand", "INV-06")
class PositionMatters(InPlace):
    def move(self, theta: list[Arrays], q: Arrays) -> Arrays:
        ramp = {k: 1 + 1e-3 * np.arange(v.size).reshape(v.shape) for k, v in q.items()}
        return super().move(theta, {k: (v * ramp[k]).astype(self.kind) for k, v in q.items()})


@mutant("shared-state", "keeps the optimizer's state in the class", "INV-09")
class SharedState(InPlace):
    shared: ClassVar[dict[tuple, State]] = {}

    def put_state(self, state: State) -> None:
        self.shared[self.key()] = state

    def key(self) -> tuple:
        return tuple((k, v.shape) for k, v in self.theta.items())

    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, config, dtype)
        self.shared.pop(self.key(), None)

    @property
    def state(self) -> State:
        return self.shared.get(self.key(), {})

    @state.setter
    def state(self, state: State) -> None:
        pass


@mutant("shared-gate", "keeps the gate in the class", "INV-09")
class SharedGate(Functional):
    kept: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, config, dtype)
        self.kept.clear()
        self.kept.update(self.gate)
        self.gate = self.kept


@mutant("horizon-of-the-last-session", "keeps its settings in the module, so that the latest session's count", "INV-09")
class HorizonOfTheLastSession(InPlace):
    latest: ClassVar[list[Config]] = []

    def __init__(self, params: Arrays, config: Config, dtype: str) -> None:
        super().__init__(params, config, dtype)
        self.latest[:] = [config]

    def scale(self, r: np.ndarray, K: int) -> np.ndarray:
        return super().scale(r, self.latest[0]["horizon"])
