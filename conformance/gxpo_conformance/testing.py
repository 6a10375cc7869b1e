"""The suite inside a port's own pytest: every clause and dtype a test.

from gxpo_conformance.testing import parametrize_with_clauses

@parametrize_with_clauses("my_port:Port")
def test_gxpo(clause):
    clause.check()
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.harness import TIME_LIMIT
from gxpo_conformance.known import Known, read_known
from gxpo_conformance.process.load import load
from gxpo_conformance.trial import BLOCKED, UNDECLARED, Trial, applies


@dataclass(frozen=True)
class ClauseInDtype:
    """What a parametrized test is given."""

    number: str
    dtype: str
    trial: Trial

    def check(self) -> None:
        """Fails with the clause's rule and the first divergence; skips, with a reason, what leans on a failed one."""
        found = self.trial.settle(self.number)[self.dtype]
        if found.verdict in (BLOCKED, UNDECLARED):
            pytest.skip(f"{found.verdict}: {found.message}")
        if found.finding is not None:
            pytest.fail(f"{self.number}: {clauses()[self.number].rule}\n{found.message}", pytrace=False)

    def __repr__(self) -> str:
        return f"{self.number}-{self.dtype}"


def parametrize_with_clauses(
    impl: str | None = None,
    *,
    command: str | None = None,
    dtypes: Iterable[str] | None = None,
    device: str = "cpu",
    known: str | None = None,
    time_limit: float = TIME_LIMIT,
) -> pytest.MarkDecorator:
    """A test for every clause that the port declares, in every dtype (`MOV-01-float32` is its id).

    impl: the adapter, "module:attribute"; or `command`: a port of its own, started and spoken to as --exec does; the
    bundled gxpo.py where both are None, and only then. known: a file of known failures, as --known takes it; they are
    strict xfails, so one that passes fails. Raises AdapterError when the adapter cannot be loaded or its declaration is
    broken.
    """
    listed = read_known(known) if known is not None else {}
    trial = Trial(load(impl, command, time_limit), dtypes, device, time_limit=time_limit)
    cases = [
        pytest.param(
            ClauseInDtype(number, dtype, trial), id=f"{number}-{dtype}", marks=marks(listed.get(number), dtype)
        )
        for number, clause in clauses().items()
        for dtype, harness in trial.harnesses.items()
        if dtype in CHECKS[number].dtypes and applies(clause, harness.capabilities)
    ]
    return pytest.mark.parametrize("clause", cases)


def marks(known: Known | None, dtype: str) -> list[pytest.MarkDecorator]:
    if known is None or (known.dtypes and dtype not in known.dtypes):
        return []
    return [pytest.mark.xfail(reason=f"{known.reason} {known.link}", strict=True)]
