"""Mistakes with what a port shares: arrays with its caller, caches with other sessions; and with interrupts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, State, mutant
from gxpo_conformance.protocol import Arrays, Gradient


@mutant("interrupt-leaves-parameters", "puts everything back on Exception, so not on Ctrl-C", "ATM-04")
class InterruptLeavesParameters(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        import sys

        if isinstance(sys.exc_info()[1], Exception):
            super().roll_back(before)


@mutant("interrupted-step-counted", "counts a step that Ctrl-C ended", "ATM-04")
class InterruptedStepCounted(Functional):
    def outer(self, grad: Gradient) -> None:
        try:
            super().outer(grad)
        except KeyboardInterrupt:
            self.gate["step"] += 1
            raise


@mutant("loss-gets-live-arrays", "hands its own arrays to the loss", "DEV-02")
class LossGetsLiveArrays(InPlace):
    def handed_out(self, point: Arrays) -> Arrays:
        return point


@mutant("loss-gets-the-points", "hands the points that it goes on computing with to the loss", "DEV-02")
class LossGetsThePoints(Functional):
    def handed_out(self, point: Arrays) -> Arrays:
        return point


@mutant("params-cached", "gives the same copies out until the next step", "DEV-02")
class ParamsCached(Functional):
    cached: Arrays | None = None

    def outer(self, grad: Gradient) -> None:
        self.cached = None
        super().outer(grad)

    def params(self) -> Arrays:
        self.cached = self.cached or super().params()
        return self.cached


@mutant("gradients-by-position", "pairs gradients with parameters by position", "DEV-03")
class GradientsByPosition(Functional):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        def by_position(at: Arrays) -> tuple[float, Arrays]:
            loss, g = grad(at)
            return loss, {k: v.reshape(at[k].shape) if v.size == at[k].size else g[k]
                          for k, v in zip(at, g.values(), strict=True)}  # fmt: skip

        return super().ask(by_position, point)


@mutant("gradients-by-memory", "reads gradients in the order of their memory", "DEV-03")
class GradientsByMemory(InPlace):
    def ask(self, grad: Gradient, point: Arrays) -> tuple[Arrays, float]:
        def by_memory(at: Arrays) -> tuple[float, Arrays]:
            loss, g = grad(at)
            return loss, {k: v.ravel(order="K").reshape(v.shape) for k, v in g.items()}

        return super().ask(by_memory, point)


@mutant("table-of-another-split", "caches which entry is whose tensor's by the number of entries and tensors", "INV-09")
class TableOfAnotherSplit(Functional):
    tables: ClassVar[dict[tuple[int, int], list[int]]] = {}

    def scales(self, theta: list[Arrays], g: list[Arrays]) -> Arrays:
        if self.config["estimator"] != "gradient":
            return super().scales(theta, g)
        own = [v.size for v in g[0].values()]
        sizes = self.tables.setdefault((sum(own), len(own)), own)
        flat, own_rms = np.concatenate([v.ravel() for v in g[0].values()]), super().rms
        each = [own_rms(p) for p in np.split(flat, np.cumsum(sizes)[:-1])]
        spread = np.split(np.repeat(each, sizes), np.cumsum(own)[:-1])
        self.looked_up = {v.tobytes(): s.reshape(v.shape) for v, s in zip(g[0].values(), spread, strict=True)}
        return super().scales(theta, g)

    def rms(self, before: np.ndarray) -> np.ndarray:
        found = self.__dict__.get("looked_up", {}).get(before.tobytes())
        return super().rms(before) if found is None or found.shape != before.shape else found


@mutant("scalars-not-copied", "takes a scalar for immutable, and puts none back where a step fails", "NUM-03")
class ScalarsNotCopied(InPlace):
    def roll_back(self, before: tuple[Arrays, State]) -> None:
        super().roll_back(({k: v if v.ndim else self.theta[k] for k, v in before[0].items()}, before[1]))


@mutant("save-hands-out-live-arrays", "saves the arrays that it goes on writing into", "CKP-10")
class SaveHandsOutLiveArrays(InPlace):
    def save(self) -> Any:
        return {"theta": self.theta, "state": {"live": self.live}, "gate": dict(self.gate)}

    def load(self, saved: Any) -> None:
        self.gate = dict(saved["gate"])
        self.write(saved["theta"])
        self.put_state(saved["state"]["live"])

    def put_state(self, state: State) -> None:
        if state.keys() != self.live.keys():
            self.live.clear()
            self.live.update({k: {n: a.copy() for n, a in v.items()} if k != "n" else v for k, v in state.items()})
        for k, v in state.items():
            if k == "n":
                self.live[k] = v
            else:
                for n, a in v.items():
                    self.live[k][n][...] = a
        self.state = {k: dict(v) if k != "n" else v for k, v in self.live.items()}

    @property
    def live(self) -> State:
        return self.__dict__.setdefault("_live", {})


@mutant("save-hands-out-the-gate", "saves the gate's own record, which it goes on changing", "CKP-01")
class SaveHandsOutTheGate(Functional):
    def save(self) -> Any:
        return {**super().save(), "gate": self.gate}


@mutant("load-keeps-the-record", "goes on in the record that it was given, and changes it", "CKP-10")
class LoadKeepsTheRecord(InPlace):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.gate = saved["gate"]


@mutant("load-keeps-the-arrays", "writes into the arrays that it was given to go on from", "CKP-10")
class LoadKeepsTheArrays(InPlace):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.theta = saved["theta"]
