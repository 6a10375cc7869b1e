"""Mistakes in what is saved and how it is read again."""

from __future__ import annotations

from typing import Any

import numpy as np

from gxpo_conformance.mutants.model import Functional, InPlace, mutant
from gxpo_conformance.mutants.numbers import FINE, in_float32


@mutant("ring-cursor-from-the-count", "overwrites the wrong slot of a full window after it is resumed", "CKP-01")
class RingCursorFromTheCount(InPlace):
    def load(self, saved: Any) -> None:
        super().load(saved)
        past, w = self.gate["history"], self.rules["window"]
        if len(past) >= w:  # slots in the order of time, the cursor at the count
            slots, cursor = past[-w:], len(past) % w
            self.gate["history"] = slots[cursor:] + slots[:cursor]


@mutant("window-saved-short", "saves one observation less than the window holds", "CKP-01")
class WindowSavedShort(Functional):
    def save(self) -> Any:
        saved = super().save()
        saved["gate"]["history"] = saved["gate"]["history"][-max(self.rules["window"] - 1, 1) :]
        return saved


@mutant("window-saved-in-float32", "saves the window in float32", "CKP-01", shows=FINE)
class WindowSavedInFloat32(Functional):
    def save(self) -> Any:
        saved = super().save()
        saved["gate"]["history"] = [in_float32(h) for h in saved["gate"]["history"]]
        return saved


@mutant("ema-count-saved-as-a-flag", "saves whether the ema has begun, not how many it has seen", "CKP-06")
class EmaCountSavedAsAFlag(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.gate["seen"] = 2 if self.gate["seen"] else 0


@mutant("ema-pin-not-saved", "saves the window's pinned baseline, but not the ema's", "CKP-06")
class EmaPinNotSaved(InPlace):
    def load(self, saved: Any) -> None:
        super().load(saved)
        if self.rules["baseline"] == "ema":
            self.gate["pin"] = None


@mutant("cooldown-anew-on-resume", "saves that the gate is closed, not since when", "CKP-07")
class CooldownAnewOnResume(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        if self.gate["closed_at"] is not None and not self.cooled():
            self.gate["closed_at"] = self.gate["step"] - 1


@mutant("momentum-saved-in-float32", "saves momentum in float32", "CKP-04", shows=FINE)
class MomentumSavedInFloat32(InPlace):
    def save(self) -> Any:
        saved = super().save()
        if "buffer" in saved["state"]:
            held = saved["state"]["buffer"]
            saved["state"]["buffer"] = {k: v.astype(np.float32).astype(self.kind) for k, v in held.items()}
        return saved


@mutant("moments-saved-in-float32", "saves AdamW's moments in float32", "CKP-09", shows=FINE)
class MomentsSavedInFloat32(Functional):
    def save(self) -> Any:
        saved = super().save()
        for name in {"m", "v"} & saved["state"].keys():
            held = saved["state"][name]
            saved["state"][name] = {k: v.astype(np.float32).astype(self.kind) for k, v in held.items()}
        return saved


@mutant("state-of-the-first-tensor", "saves the optimizer's state of the first tensor only", "CKP-10")
class StateOfTheFirstTensor(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        for name in {"buffer", "m", "v"} & self.state.keys():
            held = self.state[name]
            first = next(iter(held))
            self.state[name] = {k: v if k == first else np.zeros_like(v) for k, v in held.items()}


@mutant("budget-from-the-step-count", "takes the steps made for the active ones on resume", "CKP-05")
class BudgetFromTheStepCount(Functional):
    def load(self, saved: Any) -> None:
        super().load(saved)
        self.gate["active"] = self.gate["step"]
