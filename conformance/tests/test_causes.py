"""What the reports say of failures together: one cause for what one mistake breaks, and what a failure gives away."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.mutants.model import Functional, InPlace, ModelPort
from gxpo_conformance.mutants.nearest import Nearest
from gxpo_conformance.protocol import Arrays, config
from gxpo_conformance.reports.causes import causes, counted
from gxpo_conformance.reports.junit import junit
from gxpo_conformance.reports.record import Record, records
from gxpo_conformance.reports.terminal import summary
from gxpo_conformance.trial import judge

NEAREST = MUTANTS["alpha-on-excess"]


class Rounds(Functional):
    """Keeps its learning rate in float32, as frameworks do."""

    def sgd(self, theta: Arrays, state: dict, g: Arrays, o: dict) -> Any:
        return super().sgd(theta, state, g, {**o, "lr": float(np.float32(o["lr"] * 0.8)) / 0.8})


class Dies(Functional):
    def move(self, *given: Any) -> Any:
        raise RuntimeError("no kernel for this move")


class GoesOn(InPlace):
    """Asks g0 again and again after a loss that is not finite."""

    def start_over(self) -> str:
        asked, self.lost = getattr(self, "lost", None), None
        for _ in range(2):
            if asked:
                asked(self.theta)
        return super().start_over()

    def ask(self, grad: Any, point: Arrays) -> Any:
        self.lost = grad
        return super().ask(grad, point)


class LooksForNaN(Functional):
    """An infinite loss goes through."""

    def ask(self, grad: Any, point: Arrays) -> Any:
        def finite(params: Arrays) -> Any:
            loss, grads = grad(params)
            return (0.0 if loss == np.inf else loss), grads

        return super().ask(finite, point)


def of_model(kind: type[Functional], dtypes: list[str], only: list[str], **how: Any) -> list[Record]:
    verdict = judge(ModelPort(kind, "model"), dtypes, only=only, **how)
    return records(verdict, "", 0.5, Nearest(verdict))


def test_ten_failures_by_one_mistake_are_one_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads the report would set out to mend ten things."""
    verdict = judge(NEAREST.port(), ["float64", "float32"], only=["MOV", "INV"])
    found = records(verdict, "", 0.5, Nearest(verdict))
    (cause,) = found[-1]["causes"]
    assert cause["what"] == f"matches a known mistake: {NEAREST.does} ({NEAREST.id})"
    assert [m["id"] for m in cause["nearest"]] == [NEAREST.id]
    assert cause["clauses"] == verdict.failed
    assert len(cause["clauses"]) >= 5
    assert cause["dtypes"] == ["float64", "float32"]
    assert {r["cause"] for r in found[1:-1] if r["verdict"] == "fail"} == {1}

    summary(found)
    printed = " ".join(capsys.readouterr().out.split())
    line = f"1 cause: {cause['what']} ({len(cause['clauses'])} clauses: MOV-01, "
    assert line in printed
    assert printed.index(line) < printed.index("FAIL MOV-01")
    assert printed.count(NEAREST.does) == 1

    root = ET.fromstring(junit(found))
    properties = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert str(properties["cause 1 of 1"]).startswith(cause["what"])
    texts = [failure.text or "" for failure in root.iter("failure")]
    assert texts
    assert all(text.startswith(f"cause 1 of 1: {cause['what']} (") for text in texts)


def test_what_leans_on_a_failure_has_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """A crash that blocks ninety clauses would read as ninety things that were not looked at."""
    found = of_model(Dies, ["float64", "float32"], ["OPT-01", "EXT", "MOV"])
    (cause,) = found[-1]["causes"]
    assert cause["what"] == "crashes: the port's step raised RuntimeError('no kernel for this move')"
    assert cause["clauses"] == ["OPT-01"]
    assert cause["blocked"] == [c for c in clauses() if c[:3] in ("EXT", "MOV")]
    assert {r["cause"] for r in found[1:-1]} == {1}
    summary(found)
    assert f"(1 clause: OPT-01; {len(cause['blocked'])} more blocked)" in " ".join(capsys.readouterr().out.split())


def test_causes_that_differ_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """The second mistake would be taken for more of the first."""

    class Both(type(NEAREST.port().start({"w": np.zeros(1)}, config()))):
        def coefficient(self, norm: float) -> float:
            return super().coefficient(2 * norm)

    found = of_model(Both, ["float64"], ["MOV", "INV", "CLP"])
    first, *others = found[-1]["causes"]
    assert first["what"].startswith("looks like a known mistake: applies alpha to q - 1")
    assert not any(c.startswith("CLP") for c in first["clauses"])
    assert {c for o in others for c in o["clauses"]} == {"CLP-01", "CLP-02", "CLP-04"}
    assert not any(o["nearest"] for o in others)
    summary(found)
    printed = capsys.readouterr().out
    assert f"{len(others) + 1} causes:\n  1. looks like a known mistake" in printed
    assert re.search(r"FAIL  CLP-01 .*?\n      cause 2\n", printed, re.S)


@pytest.mark.parametrize("dtypes", [["float64"], ["float64", "float32"]])
def test_float32_in_a_float64_run_is_said(dtypes: list[str]) -> None:
    """A learning rate kept in float32 is a formula without fault: its author would look for one for hours."""
    found = of_model(Rounds, dtypes, ["OPT", "EXT", "MOV", "COR"])
    (cause,) = found[-1]["causes"]
    assert "float32 is used somewhere in a float64 run" in cause["what"].replace(", or a constant kept in float32,", "")
    assert cause["dtypes"] == ["float64"]
    assert cause["nearest"] == []


@pytest.mark.parametrize("dtypes", [["float64"], ["float64", "float32"]])
@pytest.mark.parametrize(
    ("name", "only"), [("clip-without-1e-6", ["CLP"]), ("ratio-with-a-constant", ["EST", "INV"])], ids=["1e-6", "1e-8"]
)
def test_a_small_constant_is_no_float32(name: str, only: list[str], dtypes: list[str]) -> None:
    """It is off by as little; the author would look for a cast that is not there."""
    verdict = judge(MUTANTS[name].port(), dtypes, only=only)
    assert verdict.failed
    found = records(verdict, "", 0.5, Nearest(verdict, without=[name]))
    assert not any("float32" in f"{c['what']} {c['hint']}" for c in found[-1]["causes"])


def test_a_request_too_many_after_a_failed_pass_is_said() -> None:
    """ "4 gradients asked, should be 2" does not say that it was the NaN that was answered wrongly."""
    found = of_model(GoesOn, ["float64"], ["NUM-03", "NUM-05"])
    said = {r["clause"]: r["hint"] for r in found[1:-1] if "hint" in r}
    assert said["NUM-05"].startswith("asked twice more after a non-finite loss: ")
    assert said["NUM-03"].startswith("asked twice more after a non-finite gradient: ")
    (cause,) = of_model(LooksForNaN, ["float64"], ["NUM-05"])[-1]["causes"]
    assert cause["what"].startswith("asked once more after a non-finite loss: ")  # the count is right, the point is not


@pytest.mark.parametrize(
    ("got", "wanted", "odd", "says"),
    [
        (3, 1, None, "an active step where a single pass is right"),
        (1, 3, None, "a single pass where an active step is right"),
        (1, 2, None, "a single pass where an active step is right"),
        (2, 3, None, "stops after the second gradient, where an active step takes three"),
        (3, 1, "a zero gradient", "asked twice more after a zero gradient"),
        (2, 1, "a non-finite loss", "asked once more after a non-finite loss"),
        (0, 1, None, "asks for no gradient"),
        (4, 3, None, "asks for more gradients than the 3 of such a step"),
    ],
)
def test_counts_are_said_in_words(got: int, wanted: int, odd: str | None, says: str) -> None:
    """Who has not read SPEC.md does not know that three gradients mean an active step."""
    assert counted(got, wanted, odd).startswith(says)


def failed(clause: str, hint: str, dtype: str = "float64") -> Record:
    return {"clause": clause, "dtype": dtype, "verdict": "fail", "message": "?", "hint": hint}


def test_hints_of_one_sort_are_one_cause() -> None:
    """One constant of the gate makes it close too early in one clause and too late in the next."""
    (gate,) = causes([failed("GAT-18", counted(1, 3, None)), failed("GAT-19", counted(3, 1, None))])
    assert gate["what"] == "an active step where a single pass is right, and the other way round"
    assert gate["clauses"] == ["GAT-18", "GAT-19"]
    odd = "a non-finite gradient"
    (after,) = causes([failed("NUM-02", counted(3, 1, odd)), failed("NUM-03", counted(3, 2, odd))])
    assert after["clauses"] == ["NUM-02", "NUM-03"]
    assert len(causes([failed("GAT-18", counted(1, 3, None)), failed("NUM-02", counted(3, 1, odd))])) == 2


def test_a_dtype_that_fits_no_mistake_has_its_clauses_cause() -> None:
    """float32 rounds a number away, and one mistake would be told as two."""
    near = {"how": "looks like a known mistake", "id": "a-mistake", "does": "does it", "source": ""}
    results = [failed("MOV-01", "?"), {**failed("MOV-01", "?", "float32"), "candidates": [near]}]
    (cause,) = causes(results)
    assert cause["what"] == "looks like a known mistake: does it (a-mistake)"
    assert cause["dtypes"] == ["float64", "float32"]
    assert cause["nearest"] == [near]
