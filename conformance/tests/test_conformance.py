"""The suite itself: right implementations pass, wrong ones fail by the right clause, misbehaving ones are findings."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fewer_runs import few_runs

import gxpo
from gxpo_conformance import cli
from gxpo_conformance import figures as measure
from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.adapters import torch as torch_adapter
from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.harness.case import replay
from gxpo_conformance.harness.findings import Failure, to_dtype
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import AdapterError, check_capabilities
from gxpo_conformance.search import search
from gxpo_conformance.trial import PASS, judge

# ------------------------------------------------------------------------------------------------- what is right passes


def test_gxpo_py_is_conformant(device: str) -> None:
    verdict = judge(torch_adapter.Port(), device=device)
    assert verdict.failed == []
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.headline.endswith("0 not run")
    ran = {r.dtype for results in verdict.results.values() for r in results.values() if r.verdict == PASS}
    assert ran == {"float64", "float32", "bfloat16"}


def test_the_oracle_is_conformant() -> None:
    verdict = judge(oracle_adapter.Port())
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"


# bfloat16 where clauses run in it: see SPEC.md, Budgets
CELLS = [(e, o, d) for e in gxpo.ESTIMATORS for o in measure.OPTIMIZERS for d in ("float64", "float32")]
CELLS += [("gradient", o, "bfloat16") for o in measure.OPTIMIZERS] + [("tensor", "sgd", "bfloat16")]


@pytest.mark.parametrize(("estimator", "optimizer", "dtype"), CELLS)
def test_right_ports_stay_within_their_budgets(estimator: str, optimizer: str, dtype: str, device: str) -> None:
    """A budget that right ports overrun would reject somebody's correct work."""
    port = torch_adapter.Port()
    harness = Harness(port, check_capabilities(port.capabilities()), dtype, device)
    rng = np.random.default_rng([7, len(estimator), len(optimizer)])
    for _ in range(15):
        settings = {"estimator": estimator, "optimizer": measure.OPTIMIZERS[optimizer]}
        measure.random_run(harness, rng, settings)


def test_what_right_ports_need_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    measure.main(["budgets", "--cases", "2", "--impl", "gxpo_conformance.adapters.oracle:Port"])
    printed = capsys.readouterr().out
    assert "budgets needed" in printed
    assert printed.count("0.00 / 0.00 / 0.00") == 9  # the oracle beside itself


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("port", [torch_adapter.Port, oracle_adapter.Port], ids=["gxpo.py", "oracle"])
def test_random_cases_reject_no_right_port(port: type, dtype: str) -> None:
    """Somebody's correct work must pass whatever is drawn: 20 seeds, over every option at once."""
    declared = check_capabilities(port().capabilities())
    if dtype not in declared["dtypes"]:
        pytest.skip(f"{port().name} does not compute in {dtype}")
    for seed in range(20):
        assert search(Harness(port(), declared, dtype, "cpu"), seed, 8) is None


def test_random_cases_find_what_is_wrong_and_shrink_it() -> None:
    """A hundred coordinates of noise tell an author nothing; the smallest case does."""

    class Off(oracle_adapter.Port):
        def start(self, params: Any, config: Any, **where: str) -> Any:
            return super().start(params, {**config, "alpha": config["alpha"] * 1.001}, **where)

    harness = Harness(Off(), check_capabilities(Off().capabilities()), "float64", "cpu")
    failure, case = search(harness, 1, 100)
    assert "theta~" in str(failure)
    assert len(case["steps"]) == len(case["params"]) == 1
    with pytest.raises(Failure, match="theta~"):
        replay(harness, case)
    assert replay(Harness(oracle_adapter.Port(), harness.capabilities, "float64", "cpu"), case) < 1


class CoreOnly(torch_adapter.Port):
    """A port that declares no more than it must."""

    name = "core only"

    def capabilities(self) -> dict:
        return {
            "dtypes": ["float32"],
            "devices": ["cpu"],
            "optimizers": ["sgd"],
            "estimators": ["gradient"],
            "optimizer_state": ["restore"],
            "gate_statistics": ["corrective_norm"],
            "gate_baselines": ["window"],
        }


def test_what_is_not_declared_is_not_tested_and_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with few_runs():
        verdict = judge(CoreOnly())
    assert verdict.exit_status == 0
    assert {c for c in clauses() if verdict.of(c) == "undeclared"} >= {"EST-10", "GAT-11", "CKP-01", "ATM-01", "CLP-01"}
    assert verdict.of("OPT-05") == PASS
    assert verdict.of("OPT-04") == "undeclared"


@pytest.mark.parametrize("value", [1.0, -3.0, 1.00390625, 1.01171875, 3.0e38, 1e-3, 0.0])
def test_rounding_to_bfloat16_is_torchs(value: float) -> None:
    """Ties to even included: a gradient that the suite rounds otherwise than the port would be another gradient."""
    assert to_dtype(value, "bfloat16").item() == torch.tensor(value, dtype=torch.float32).bfloat16().item()


# ------------------------------------------------------------------------------- what is wrong fails, by its own clause


class AlphaOnExcess(gxpo.GXPO):
    """alpha applied to q - 1: theta~ = theta0 + (1 + alpha (q - 1)) (theta2 - theta0)."""

    def _move(self, step: Any) -> None:
        for rows in step.rows:
            rows.kept.sub_(1).mul_(self.alpha).add_(1)
        alpha, self.alpha = self.alpha, 1.0
        super()._move(step)
        self.alpha = alpha


class ClippedStatistic(gxpo.GXPO):
    """The gate fed the clipped norm."""

    def _last_step(self, step: Any, g: Any) -> None:
        gate, limit = self.gate, self.max_grad_norm or math.inf

        def after(s: gxpo.GateState, active: bool, h: float | None) -> Any:
            return gate.after(s, active, h if h is None else min(h, limit))

        self.gate = SimpleNamespace(statistic=gate.statistic, is_open=gate.is_open, after=after)
        super()._last_step(step, g)
        self.gate = gate


class NeverRestored(gxpo.GXPO):
    """optimizer_state="restore" that keeps."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "optimizer_state": "keep"})


class RollbackForgetsState(gxpo.GXPO):
    """Parameters come back after a failed step, the optimizer's state does not."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "rollback": False})


class FourthPass(gxpo.GXPO):
    """Takes the corrective gradient twice."""

    def _active_step(self, step: Any, g: Any) -> Any:
        yield from super()._active_step(step, g)
        self._empty_grad(step)
        return (yield from self._gradient(step))


PLANTED: dict[str, tuple[type, set[str]]] = {
    # the wrong one, and the clauses that must name it (whole runs and identities may fail with it)
    "alpha on the excess": (AlphaOnExcess, {"MOV-01", "MOV-02"}),
    "clipped statistic": (ClippedStatistic, {"CLP-03"}),
    "state not restored": (NeverRestored, {"OPT-05"}),
    "rollback forgets state": (RollbackForgetsState, {"ATM-02", "NUM-03", "NUM-04", "NUM-05"}),
    "a fourth pass": (FourthPass, {"CST-01"}),
}


BESIDE = {
    # whole runs and identities at alpha < 1 see it too, and where the corrective step starts cannot be told apart
    "alpha on the excess": {"MOV-03", "MOV-04", "COR-01", "INV", "TOY"},
    "clipped statistic": set[str](),
    "state not restored": {"OPT-06"},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_named(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gxpo.py itself, wrong in one place. (The suite's own mutants are many more: gxpo-conformance selftest.) A mistake
    that fails everything tells its author nothing."""
    wrong, named = PLANTED[planted]
    monkeypatch.setattr(gxpo, "GXPO", wrong)
    verdict = judge(torch_adapter.Port(), ["float64"])
    assert verdict.exit_status == 1
    assert named <= set(verdict.failed), verdict.failed
    if planted in BESIDE:
        others = set(verdict.failed) - named
        assert {c for c in others if not {c, c[:3]} & BESIDE[planted]} == set()


def test_the_command_names_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gxpo, "GXPO", NeverRestored)
    assert cli.main(["--dtype", "float64", "--only", "OPT"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  OPT-05  float64" in printed
    assert "verdict: not conformant: OPT-05" in printed


def test_a_wrong_optimizer_blocks_the_rest() -> None:
    """Forty failures with one cause send people looking in forty places."""

    class Wrong(torch_adapter.Port):
        def start(self, params: Any, config: Any, **where: str) -> Any:
            wrong = {**config, "optimizer": {**config["optimizer"], "lr": 1.01 * config["optimizer"]["lr"]}}
            return super().start(params, wrong, **where)

    verdict = judge(Wrong(), ["float64"])
    assert verdict.failed[0] == "OPT-01"
    assert {verdict.of(c) for c in ("EST-01", "GAT-01", "MOV-01", "TOY-01")} == {"blocked"}
    assert verdict.exit_status == 1


def test_a_failure_says_where() -> None:
    class Off(torch_adapter.Port):
        def start(self, params: Any, config: Any, **where: str) -> Any:
            return super().start(params, {**config, "alpha": config["alpha"] * 1.001}, **where)

    result = judge(Off(), ["float32"], only=["MOV-01"]).results["MOV-01"]["float32"]
    assert re.match(
        r"step 0: theta~, the third point asked, differs: w\[\d\] is .*, should be .* budgets off", result.message
    )


# ------------------------------------------------------------------------------------------------- ports that misbehave


def session(**methods: Callable[..., Any]) -> type:
    """gxpo.py's adapter with some of a session's methods replaced."""
    kind = type("Odd", (torch_adapter.Session,), methods)

    class Port(torch_adapter.Port):
        def start(self, params: Any, config: Any, dtype: str = "float64", device: str = "cpu") -> Any:
            return kind(params, config, getattr(torch, dtype), device)

    return Port


def crash(self: Any, *_: Any) -> None:
    raise RuntimeError("out of cheese")


def hangs(self: Any, *_: Any) -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # what a careless port catches
            continue


def swallows(self: Any, grad: Any) -> None:
    with contextlib.suppress(Exception):
        grad({"w": np.zeros(3)})


def asks_for_ever(self: Any, grad: Any) -> None:
    while True:
        grad(self.params())


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (session(step=crash), "the port's step raised RuntimeError('out of cheese')"),
        (session(params=lambda self: {"v": np.zeros(2)}), "params() gives tensors ['v'], not ['w']"),
        (session(params=lambda self: {"w": np.zeros((1, 8))}), "params() gives 'w' of shape and dtype ((1, 8), "),
        (session(params=lambda self: [1.0]), "params() gives tensors list, not ['w']"),
        (session(step=asks_for_ever), "more than 12 gradients in one step"),
        (session(step=lambda self, grad: None), "0 gradients asked in an active step, should be 3"),
        (session(step=lambda self, grad: sys.exit(3)), "the port's step raised SystemExit(3)"),
        (session(step=swallows), "the port asked for a gradient (call 1) at 'w' of shape and dtype"),
        (session(params=hangs), "the port's params() did not return within 0.5 s"),
    ],
)
def test_a_port_that_misbehaves_is_a_finding(port: type, message: str) -> None:
    """Never a stack trace of the suite, never a stuck run."""
    verdict = judge(port(), ["float64"], time_limit=0.5)
    assert verdict.failed == ["OPT-01"]
    assert message in verdict.results["OPT-01"]["float64"].message


def test_a_port_that_hangs_again_and_again_does_not_cost_the_day() -> None:
    """Eighty time limits one after another would look like a stuck run."""
    verdict = judge(session(save=hangs)(), ["float64"], only=["CKP"], time_limit=0.3)
    assert verdict.failed == ["CKP-01", "CKP-02", "CKP-03"]
    left = verdict.results["CKP-04"]["float64"]
    assert left.verdict == "blocked"
    assert left.message == "the port ran out of time in CKP-01 in float64, CKP-02 in float64, CKP-03 in float64"


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ([], "capabilities() must return a dict, got list"),
        ({"colour": []}, "unknown key 'colour'"),
        ({"dtypes": ["float16"]}, "capabilities()['dtypes'] must be a list out of"),
        ({"optimizers": ["adamw"]}, "capabilities()['optimizers'] must hold 'sgd', the core"),
        ({"checkpoint": 1}, "capabilities()['checkpoint'] must be true or false, got 1"),
        ({"dtypes": ["bfloat16"]}, "bfloat16 alone certifies nothing"),
    ],
)
def test_a_broken_declaration_is_told_before_anything_runs(capabilities: Any, message: str) -> None:
    full = CoreOnly().capabilities()
    with pytest.raises(AdapterError, match=re.escape(message)):
        check_capabilities({**full, **capabilities} if isinstance(capabilities, dict) else capabilities)
