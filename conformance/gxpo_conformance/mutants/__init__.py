"""Wrong implementations, each in one way, that the suite has to reject; and right ones that it has to let pass."""

from __future__ import annotations

from gxpo_conformance.mutants import failures, gate, gate_options, optimizer, point, ratio, shapes
from gxpo_conformance.mutants.model import LEAST_MARGIN, MUTANTS, Mutant, correct

__all__ = [
    "LEAST_MARGIN",
    "MUTANTS",
    "Mutant",
    "correct",
    "failures",
    "gate",
    "gate_options",
    "optimizer",
    "point",
    "ratio",
    "shapes",
]
