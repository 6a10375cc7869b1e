"""Wrong implementations, each in one way, that the suite has to reject; and right ones that it has to let pass."""

from __future__ import annotations

from gxpo_conformance.mutants import (
    checkpoints,
    counting,
    failures,
    gate,
    gate_options,
    in_process,
    numbers,
    optimizer,
    point,
    ratio,
    settings,
    shapes,
    sizes,
)
from gxpo_conformance.mutants.model import LEAST_MARGIN, MUTANTS, Mutant
from gxpo_conformance.mutants.right import correct

__all__ = [
    "LEAST_MARGIN",
    "MUTANTS",
    "Mutant",
    "checkpoints",
    "correct",
    "counting",
    "failures",
    "gate",
    "gate_options",
    "in_process",
    "numbers",
    "optimizer",
    "point",
    "ratio",
    "settings",
    "shapes",
    "sizes",
]
