"""Random runs: a fixed number of them, by seed, over the core and over all that a port declares."""

from __future__ import annotations

from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.runs.play import check as check_runs


@check("RND-01")
def random_runs_over_the_core(harness: Harness) -> None:
    check_runs(harness, "RND-01")


@check("RND-02")
def random_runs_over_all_that_is_declared(harness: Harness) -> None:
    check_runs(harness, "RND-02")
