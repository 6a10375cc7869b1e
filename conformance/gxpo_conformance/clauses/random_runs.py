"""Random runs: a fixed number of them, by seed, over the core and over all that a port declares."""

from __future__ import annotations

from gxpo_conformance.clauses.table import check
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.runs.play import named, play

# The fixed part is one run; the two hundred of a verdict come with the awkward runs, once everything else passes.


@check("RND-01")
def random_runs_over_the_core(harness: Harness) -> None:
    play(harness, named("RND-01#fixed/0", harness))


@check("RND-02")
def random_runs_over_all_that_is_declared(harness: Harness) -> None:
    play(harness, named("RND-02#fixed/0", harness))
