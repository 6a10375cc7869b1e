"""Wrong implementations, each in one way, that the suite has to reject; and right ones that it has to let pass."""

from __future__ import annotations

from gxpo_conformance.mutants import failures, gate, optimizer, point, ratio, shapes
from gxpo_conformance.mutants.model import MUTANTS, Mutant, correct

__all__ = ["MUTANTS", "Mutant", "correct", "failures", "gate", "optimizer", "point", "ratio", "shapes"]
