"""Random runs beyond those of a verdict, by other seeds, shrunk to the smallest that fails.

They are RND-02's, made from whatever a port declares; the verdict's have seed 0, these start at 1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

from gxpo_conformance.harness.case import Case, as_case
from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.runs.play import attempt, named, shrunk


def refused(failure: Failure) -> bool:
    """Whether the port took the configuration for one that it does not do, which is no failure of the method."""
    return isinstance(failure.__cause__, ValueError) and failure.finding.step is None


def search(
    harness: Harness, seed: int, cases: int, on_case: Callable[[int, str], None] = lambda done, refusal: None
) -> tuple[Failure, Case] | None:
    """The smallest failing run that `cases` random ones lead to; None where none fails. `on_case`: told how many are
    done, and of a configuration that the port refuses the port's own words."""
    for n in range(cases):
        awkward = named(f"RND-02#{seed}/{n}", harness)
        harness.talks.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # what a port prints
            failure = attempt(harness, awkward)
            if failure is not None and not refused(failure):
                smallest = shrunk(harness, awkward, failure)
                assert harness.latest is not None  # it asked, or there were no failure
                return smallest, as_case(harness.latest)
        on_case(n + 1, "" if failure is None else f"{awkward.name}: {failure}")
    return None
