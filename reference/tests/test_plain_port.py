"""The port in plain numpy is right: what mutation makes of it is then wrong by that alone."""

from __future__ import annotations

from gxpo_conformance.protocol import everything
from gxpo_conformance.trial import judge
from gxpo_reference.ports.plain import Port


def test_it_declares_everything_that_a_cpu_has() -> None:
    declared = Port().capabilities()
    assert declared == {**everything(), "dtypes": ["float64", "float32"], "devices": ["cpu"]}


def test_the_suite_finds_it_conformant() -> None:
    verdict = judge(Port())
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.exit_status == 0
