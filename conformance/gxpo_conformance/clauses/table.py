"""The clauses, read from SPEC.md, and the checks that show them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from gxpo_conformance.harness.harness import Harness

GROUPS = {
    "EST": "ratio and activity",
    "EXT": "virtual point",
    "MOV": "partial move",
    "COR": "corrective step",
    "CLP": "clipping",
    "OPT": "optimizer and its state",
    "GAT": "gate and fallback",
    "NUM": "zero and non-finite gradients",
    "ATM": "exceptions",
    "CST": "cost",
    "DEV": "shapes and sessions",
    "CKP": "save and load",
    "INV": "identities",
    "TOY": "whole runs",
    "RND": "random runs",
}


@dataclass(frozen=True)
class Clause:
    id: str
    level: str  # "MUST" (core) or "OPTION" (binding for a port that declares what it needs)
    needs: tuple[str, ...]  # capabilities, "key" or "key:value"
    seen_at: str  # what a black box shows of it
    rule: str


@dataclass(frozen=True)
class Check:
    clause: str
    function: Callable[[Harness], None]
    dtypes: tuple[str, ...]
    leans: tuple[str, ...]  # clauses whose failure leaves this one without a meaning: blocked


CHECKS: dict[str, Check] = {}
CALIBRATION = "OPT-01"  # where a port's SGD is not torch's, nothing else can be judged


def check(
    clause: str, *, coarse: bool = False, leans: tuple[str, ...] = (), dtypes: tuple[str, ...] = ("float64", "float32")
) -> Callable[[Callable[[Harness], None]], Callable[[Harness], None]]:
    """Register the check of a clause. `coarse`: bfloat16 parameters can show it, too."""

    def register(function: Callable[[Harness], None]) -> Callable[[Harness], None]:
        if clause in CHECKS:
            raise ValueError(f"{clause} has two checks: {CHECKS[clause].function.__name__}, {function.__name__}")
        on = () if clause == CALIBRATION else (CALIBRATION,)
        CHECKS[clause] = Check(clause, function, (*dtypes, "bfloat16") if coarse else dtypes, (*on, *leans))
        return function

    return register


SPEC = resources.files("gxpo_conformance").joinpath("SPEC.md").read_text(encoding="utf-8")
SPEC_VERSION = SPEC.splitlines()[0].split()[-1]  # of its title


@functools.cache
def clauses() -> dict[str, Clause]:
    """Every clause of SPEC.md's table, in its order."""
    rows = re.findall(r"^\| ([A-Z]{3}-\d\d) \| (MUST|OPTION) \|([^|]*)\| ([^|]+) \| ([^|]+) \|$", SPEC, re.M)
    found = {n: Clause(n, level, tuple(re.findall(r"`([^`]+)`", needs)), *rest) for n, level, needs, *rest in rows}
    if len(found) != len(rows):
        raise ValueError("SPEC.md uses a clause number twice")
    return found
