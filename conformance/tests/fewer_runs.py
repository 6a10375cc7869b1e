"""For tests that need some verdict, not this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gxpo_conformance.runs import play


@contextmanager
def few_runs() -> Iterator[None]:
    """Of each clause one awkward run, of the random ones four: all that a verdict has, in a tenth of the time."""
    planned = play.planned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play, "planned", lambda clause: planned(clause)[:1])
        patch.setattr(play, "RANDOM_RUNS", dict.fromkeys(play.RANDOM_RUNS, 4))
        yield
