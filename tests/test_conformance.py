"""The suite itself: right implementations pass, wrong ones fail by the right clause, and SPEC.md says what is run."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gxpo
from gxpo_conformance import cli, measure
from gxpo_conformance.bench import Bench, to_dtype
from gxpo_conformance.checks import CHECKS, GROUPS, SPEC, SPEC_VERSION, clauses
from gxpo_conformance.ports import oracle_port, torch_port
from gxpo_conformance.protocol import AdapterError, check_capabilities, config
from gxpo_conformance.run import PASS, run

TIMES = re.compile(r"in [\d.]+ s")


# ------------------------------------------------------------------------------------------------ what is right passes


def test_gxpo_py_is_conformant(device: str) -> None:
    verdict = run(torch_port.Port(), device=device)
    assert verdict.failed == []
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.headline.endswith("0 not run")
    ran = {r.dtype for results in verdict.results.values() for r in results.values() if r.verdict == PASS}
    assert ran == {"float64", "float32", "bfloat16"}


def test_the_oracle_is_conformant() -> None:
    verdict = run(oracle_port.Port())
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"


# bfloat16 where clauses run in it: see SPEC.md, Budgets
CELLS = [(e, o, d) for e in gxpo.ESTIMATORS for o in measure.OPTIMIZERS for d in ("float64", "float32")]
CELLS += [("gradient", o, "bfloat16") for o in measure.OPTIMIZERS] + [("tensor", "sgd", "bfloat16")]


@pytest.mark.parametrize(("estimator", "optimizer", "dtype"), CELLS)
def test_right_ports_stay_within_their_budgets(estimator: str, optimizer: str, dtype: str, device: str) -> None:
    """A budget that right ports overrun would reject somebody's correct work."""
    port = torch_port.Port()
    bench = Bench(port, check_capabilities(port.capabilities()), dtype, device)
    rng = np.random.default_rng([7, len(estimator), len(optimizer)])
    for _ in range(15):
        settings = {"estimator": estimator, "optimizer": measure.OPTIMIZERS[optimizer]}
        measure.random_run(bench, rng, settings)


def test_what_right_ports_need_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    measure.main(["--cases", "2", "--impl", "gxpo_conformance.ports.oracle_port:Port"])
    printed = capsys.readouterr().out
    assert "budgets needed" in printed
    assert printed.count("0.00 / 0.00 / 0.00") == 9  # the oracle beside itself


class CoreOnly(torch_port.Port):
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
    verdict = run(CoreOnly())
    assert verdict.exit_status == 0
    assert {c for c in clauses() if verdict.of(c) == "undeclared"} >= {"EST-10", "GAT-11", "CKP-01", "ATM-01", "CLP-01"}
    assert verdict.of("OPT-05") == PASS
    assert verdict.of("OPT-04") == "undeclared"


class NumpyCore:
    """A port written from SPEC.md in plain numpy, in the run's own dtype: the core and nothing else."""

    name = "numpy core"

    def capabilities(self) -> dict:
        return {**CoreOnly().capabilities(), "dtypes": ["float64", "float32"]}

    def start(self, params: Any, config: Any, dtype: str = "float64", device: str = "cpu") -> NumpySession:
        if config["horizon"] < 2:
            raise ValueError(f"horizon must be >= 2, got {config['horizon']}")
        return NumpySession(params, config, np.dtype(dtype).type)


class NumpySession:
    def __init__(self, params: Any, config: Any, kind: type) -> None:
        self.theta, self.config, self.kind = {k: v.astype(kind) for k, v in params.items()}, config, kind
        self.buffer: dict[str, Any] = {}
        self.past: list[float] = []
        self.closed = False

    def params(self) -> dict[str, np.ndarray]:
        return {k: v.copy() for k, v in self.theta.items()}

    def update(self, theta: Any, buffer: Any, g: Any) -> tuple[Any, Any]:
        lr, mu, decay = (self.kind(self.config["optimizer"][k]) for k in ("lr", "momentum", "weight_decay"))
        d = {k: g[k] + decay * theta[k] for k in theta}
        buffer = {k: mu * buffer[k] + d[k] if buffer else d[k] for k in theta}
        return {k: np.asarray(theta[k] - lr * buffer[k]) for k in theta}, buffer

    def scale(self, g0: np.ndarray, g1: np.ndarray) -> np.ndarray:
        K, one = self.config["horizon"], self.kind(1)
        active = np.abs(g0) > 1e-3 * np.sqrt(np.mean(g0 * g0))
        with np.errstate(all="ignore"):
            r = np.where(active, g1 / g0, 0)
            r = np.clip(np.where(np.isfinite(r), r, 0), -2, 3).astype(self.kind)
            q = sum((r ** (2 * n) for n in range(K // 2)), 0 * r)
            q = q + r ** (K - 1) / (one + r) if K % 2 else q
        neutral = (K % 2 == 1) & (r <= -1 + 1e-8)
        return np.clip(np.where(neutral, 1, q), 1, K / 2 + 1).astype(self.kind)

    def step(self, grad: Any) -> None:
        g0 = grad(self.params())[1]
        theta1, buffer1 = self.update(self.theta, self.buffer, g0)
        if self.closed or not any(g.any() for g in g0.values()):
            self.theta, self.buffer = theta1, buffer1
            return
        g1 = grad({k: v.copy() for k, v in theta1.items()})[1]
        theta2, _ = self.update(theta1, buffer1, g1)
        a = self.kind(self.config["alpha"])
        tilde = {k: np.asarray(t + a * self.scale(g0[k], g1[k]) * (theta2[k] - t)) for k, t in self.theta.items()}
        g = grad({k: v.copy() for k, v in tilde.items()})[1]
        self.theta, self.buffer = self.update(tilde, self.buffer, g)  # restore
        gate, h = self.config["gate"], float(np.sqrt(sum(np.sum(v.astype(float) ** 2) for v in g.values())))
        past = self.past[-gate["window"] :]
        if len(past) == gate["window"]:
            self.closed = (h - np.mean(past)) / (np.std(past) + 1e-9) >= gate["threshold"]
        self.past.append(h)


def test_a_port_written_from_the_spec_passes() -> None:
    """Somebody else's correct work, in float32 arithmetic of its own, must not be rejected."""
    verdict = run(NumpyCore())
    assert verdict.failed == [], verdict.results[verdict.failed[0]]
    assert verdict.exit_status == 0


# ------------------------------------------------------------------------------- what is wrong fails, by its own clause


class AlphaOnExcess(gxpo.GXPO):
    """alpha applied to q - 1: theta~ = theta0 + (1 + alpha (q - 1)) (theta2 - theta0)."""

    def _move(self, step: Any) -> None:
        for p, theta0 in step.theta0.items():
            p.copy_(theta0 + (1 + self.alpha * (step.kept[p] - 1)) * (p - theta0))


class ClippedStatistic(gxpo.GXPO):
    """The gate fed the clipped norm."""

    def _last_step(self) -> None:
        if self._open.statistic is not None and self.max_grad_norm is not None:
            self._open.statistic = min(self._open.statistic, self.max_grad_norm)
        super()._last_step()


class NeverRestored(gxpo.GXPO):
    """optimizer_state="restore" that keeps."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "optimizer_state": "keep"})


class RollbackForgetsState(gxpo.GXPO):
    """Parameters come back after a failed step, the optimizer's state does not."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "rollback": False})


class FromTheta2(gxpo.GXPO):
    """The corrective step starts from theta2: no move at all."""

    def _move(self, step: Any) -> None:
        pass


class FourthPass(gxpo.GXPO):
    """Three fast steps in place of two."""

    FAST_STEPS = 3


class OneStatistic(gxpo.GXPO):
    """Watches |g0| whatever was asked for."""

    def _last_step(self) -> None:
        if self._open.statistic is not None:
            self._open.statistic = self._open.norms[0]
        super()._last_step()


class Forgetful(gxpo.GXPO):
    """Resuming opens the gate."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.gate_state = gxpo.GateState()


class SwallowsErrors(gxpo.GXPO):
    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except RuntimeError:
            return None
        except Exception:
            return None


def closed_form(r: torch.Tensor, horizon: int) -> torch.Tensor:
    eps = 1e-8
    return ((1 - r**horizon + eps) / (1 - r**2 + eps)).nan_to_num(nan=1.0).clamp(1.0, horizon / 2 + 1)


def unbounded(r: torch.Tensor, horizon: int) -> torch.Tensor:
    return sum(r**n for n in range(horizon)) / (1 + r)


def pole_at_the_cap(r: torch.Tensor, horizon: int) -> torch.Tensor:
    q = gxpo_scale(r, horizon)
    return torch.where((1 + r).abs() <= 1e-8, horizon / 2 + 1, q) if horizon % 2 else q


gxpo_scale = gxpo.extrapolation_scale


def no_activity(before: torch.Tensor, after: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    return (after / before).nan_to_num(0.0, 0.0, 0.0).clamp(-2.0, 3.0)


def additive(before: torch.Tensor, after: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    r = torch.where(before.abs() > 1e-3 * rms, after / (before + 1e-4), 0.0)
    return r.nan_to_num(0.0, 0.0, 0.0).clamp(-2.0, 3.0)


class Includes(gxpo.Gate):
    """The window holds the value that it scores."""

    def after(self, s: gxpo.GateState, active: bool, h: float | None = None) -> Any:
        if h is not None and s.seen >= self.window:
            s = gxpo.dataclasses.replace(s, history=(*s.history, h))
        return super().after(s, active, h)


class SampleDeviation(gxpo.Gate):
    def usual(self, s: gxpo.GateState) -> tuple[float, float] | None:
        found = super().usual(s)
        n = self.window if self.baseline == "window" else math.inf
        return found and (found[0], found[1] / math.sqrt(1 - 1 / n))


class Unfilled(gxpo.Gate):
    def usual(self, s: gxpo.GateState) -> tuple[float, float] | None:
        if 2 <= s.seen < self.window:
            return float(np.mean(s.history)), float(np.std(s.history))
        return super().usual(s)


class Unpinned(gxpo.Gate):
    def after(self, s: gxpo.GateState, active: bool, h: float | None = None) -> Any:
        return super().after(gxpo.dataclasses.replace(s, pinned=None), active, h)


class ColdStart(gxpo.Gate):
    def usual(self, s: gxpo.GateState) -> tuple[float, float] | None:
        return super().usual(gxpo.dataclasses.replace(s, seen=s.seen + 2))


class Late(gxpo.Gate):
    """One more active step after the trip."""

    def is_open(self, s: gxpo.GateState) -> bool:
        return super().is_open(s) or (s.fallback_step is not None and s.step <= s.fallback_step + 1)


PLANTED: dict[str, tuple[str, Any, set[str]]] = {
    # name in gxpo.py, the wrong one, and the clauses that must name it (whole runs and identities may fail with it)
    "alpha on the excess": ("GXPO", AlphaOnExcess, {"MOV-01", "MOV-02"}),
    "clipped statistic": ("GXPO", ClippedStatistic, {"CLP-03"}),
    "state not restored": ("GXPO", NeverRestored, {"OPT-05"}),
    "rollback forgets state": ("GXPO", RollbackForgetsState, {"ATM-02", "NUM-03", "NUM-04", "NUM-05"}),
    "corrects from theta2": ("GXPO", FromTheta2, {"MOV-01", "MOV-02", "COR-01", "EXT-01"}),
    "a fourth pass": ("GXPO", FourthPass, {"CST-01"}),
    "watches the first norm": ("GXPO", OneStatistic, {"GAT-07"}),
    "resume opens the gate": ("GXPO", Forgetful, {"CKP-01", "CKP-02", "CKP-03"}),
    "swallows errors": ("GXPO", SwallowsErrors, {"ATM-01"}),
    "closed form": ("extrapolation_scale", closed_form, {"EXT-03"}),
    "q without bounds": ("extrapolation_scale", unbounded, {"EXT-04"}),
    "pole taken as the cap": ("extrapolation_scale", pole_at_the_cap, {"EXT-05"}),
    "no activity rule": ("retention_ratio", no_activity, {"EST-02"}),
    "additive constant": ("retention_ratio", additive, {"INV-05"}),
    "window holds its own value": ("Gate", Includes, {"GAT-02"}),
    "sample deviation": ("Gate", SampleDeviation, {"GAT-03"}),
    "scores an unfilled window": ("Gate", Unfilled, {"GAT-04"}),
    "baseline not pinned": ("Gate", Unpinned, {"GAT-11", "GAT-23"}),
    "cold start": ("Gate", ColdStart, {"GAT-18"}),
    "falls back one step late": ("Gate", Late, {"GAT-01"}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_named(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that passes any of these certifies nothing."""
    name, wrong, named = PLANTED[planted]
    monkeypatch.setattr(gxpo, name, wrong)
    verdict = run(torch_port.Port(), ["float64"])
    assert verdict.exit_status == 1
    assert named <= set(verdict.failed), verdict.failed


@pytest.mark.parametrize(
    ("planted", "and_no_other"),
    [
        # whole runs and identities at alpha < 1 see it too, and where the corrective step starts cannot be told apart
        ("alpha on the excess", {"MOV-01", "MOV-02", "MOV-03", "MOV-04", "COR-01", "INV", "TOY"}),
        ("clipped statistic", {"CLP-03"}),
        ("state not restored", {"OPT-05", "OPT-06"}),
        ("sample deviation", {"GAT-03", "TOY"}),
    ],
)
def test_a_planted_error_names_no_unrelated_clause(planted: str, and_no_other: set[str], monkeypatch: Any) -> None:
    """A mistake that fails everything tells its author nothing."""
    name, wrong, _ = PLANTED[planted]
    monkeypatch.setattr(gxpo, name, wrong)
    failed = run(torch_port.Port(), ["float64"]).failed
    assert [c for c in failed if c not in and_no_other and c[:3] not in and_no_other] == []


def test_a_wrong_optimizer_blocks_the_rest() -> None:
    """Forty failures with one cause send people looking in forty places."""

    class Wrong(torch_port.Port):
        def start(self, params: Any, config: Any, **where: str) -> Any:
            wrong = {**config, "optimizer": {**config["optimizer"], "lr": 1.01 * config["optimizer"]["lr"]}}
            return super().start(params, wrong, **where)

    verdict = run(Wrong(), ["float64"])
    assert verdict.failed[0] == "OPT-01"
    assert {verdict.of(c) for c in ("EST-01", "GAT-01", "MOV-01", "TOY-01")} == {"blocked"}
    assert verdict.exit_status == 1


def test_a_failure_says_where() -> None:
    class Off(torch_port.Port):
        def start(self, params: Any, config: Any, **where: str) -> Any:
            return super().start(params, {**config, "alpha": config["alpha"] * 1.001}, **where)

    result = run(Off(), ["float32"], only=["MOV-01"]).results["MOV-01"]["float32"]
    assert re.match(
        r"step 0: theta~, the third point asked, differs: w\[\d\] is .*, should be .* budgets off", result.message
    )


# ------------------------------------------------------------------------------------------- ports that misbehave


def session(**methods: Callable[..., Any]) -> type:
    """gxpo.py's adapter with some of a session's methods replaced."""
    kind = type("Odd", (torch_port.Session,), methods)

    class Port(torch_port.Port):
        def start(self, params: Any, config: Any, dtype: str = "float64", device: str = "cpu") -> Any:
            return kind(params, config, getattr(torch, dtype), device)

    return Port


def crash(self: Any, *_: Any) -> None:
    raise RuntimeError("out of cheese")


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
    ],
)
def test_a_port_that_misbehaves_is_a_finding(port: type, message: str) -> None:
    """Never a stack trace of the suite, never a stuck run."""
    verdict = run(port(), ["float64"])
    assert verdict.failed == ["OPT-01"]
    assert message in verdict.results["OPT-01"]["float64"].message


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


# ------------------------------------------------------------------------------------------- SPEC.md and the command


def test_every_clause_has_a_check_and_every_check_a_clause() -> None:
    assert set(CHECKS) == set(clauses())
    assert {c[:3] for c in clauses()} == set(GROUPS)
    for check in CHECKS.values():
        assert set(check.leans) <= set(clauses())


def test_every_clause_has_its_reason_and_source() -> None:
    """A rule that nobody can justify is one that nobody can change."""
    reasons = SPEC.split("## Reasons")[1]
    for low, high in re.findall(r"\*?\*?([A-Z]{3}-\d\d)\*?\*? to \*?\*?(?:[A-Z]{3}-)?(\d\d)", reasons):
        reasons += " ".join(f"{low[:3]}-{n:02d}" for n in range(int(low[4:]), int(high) + 1))
    whole_groups = {"INV", "TOY"}  # one paragraph for all of the group
    missing = [c for c in clauses() if c not in reasons and c[:3] not in whole_groups]
    assert missing == []


def test_gxpo_py_follows_this_spec() -> None:
    """A pasted copy names the version that it follows."""
    assert gxpo.SPEC_VERSION == SPEC_VERSION == "1.0"


def test_clause_numbers_in_gxpo_py_exist() -> None:
    with open(gxpo.__file__, encoding="utf-8") as file:
        cited = set(re.findall(r"\b[A-Z]{3}-\d\d\b", file.read()))
    assert cited
    assert cited <= set(clauses())


@pytest.mark.parametrize(
    ("arguments", "status", "last"),
    [
        (["--dtype", "float64"], 0, "verdict: conformant"),
        (["--only", "EXT,GAT-03", "--dtype", "float32"], 3, "verdict: incomplete"),
        (["--dtype", "bfloat16"], 3, "verdict: incomplete"),
    ],
)
def test_the_command_and_its_exit_status(arguments: list[str], status: int, last: str, capsys: Any) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr().out
    assert last in printed
    assert printed.rstrip().endswith("end of report")  # a cut-off report cannot look whole
    assert "EXT-03  MUST" in printed
    assert max(map(len, printed.splitlines())) <= 132


def test_the_command_names_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gxpo, "GXPO", NeverRestored)
    assert cli.main(["--dtype", "float64"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  OPT-05  float64" in printed
    assert "verdict: not conformant: OPT-05" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "no_such_module:Port"], "--impl no_such_module:Port: ModuleNotFoundError"),
        (["--impl", "gxpo"], "--impl must be module:attribute"),
        (["--impl", "gxpo:nothing"], "AttributeError"),
    ],
)
def test_a_broken_adapter_is_exit_status_2(arguments: list[str], message: str, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert cli.main(["--device", "cuda"]) == 2
    assert "does not declare cuda among its devices" in capsys.readouterr().err


def test_the_suite_needs_no_torch_for_other_ports() -> None:
    """People who port to JAX or plain numpy must not have to install torch to be judged."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from gxpo_conformance.cli import main\n"
        "sys.exit(main(['--impl', 'gxpo_conformance.ports.oracle_port:Port', '--only', 'EXT']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "EXT-05  MUST" in done.stdout


def test_two_runs_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        cli.main(["--dtype", "float32", "--only", "EST,TOY"])
        printed.append(TIMES.sub("", capsys.readouterr().out))
    assert printed[0] == printed[1]


@pytest.mark.parametrize("value", [1.0, -3.0, 1.00390625, 1.01171875, 3.0e38, 1e-3, 0.0])
def test_rounding_to_bfloat16_is_torchs(value: float) -> None:
    """Ties to even included: a gradient that the suite rounds otherwise than the port would be another gradient."""
    assert to_dtype(value, "bfloat16").item() == torch.tensor(value, dtype=torch.float32).bfloat16().item()


def test_a_config_holds_every_key() -> None:
    made = config(gate={"patience": 2}, optimizer={"name": "adamw"})
    assert made["gate"].keys() == {
        "statistic", "baseline", "window", "omega", "threshold", "patience", "two_sided", "warmup", "cooldown",
        "max_active_steps",
    }  # fmt: skip
    assert made["optimizer"].keys() == {"name", "lr", "betas", "eps", "weight_decay"}
    with pytest.raises(KeyError, match="no such key in a config"):
        config(horizont=3)
