"""minimal.py: the page that people read first has to be GXPO, the same one as gxpo.py, and has to stay a page."""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gxpo
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import check_capabilities, config
from gxpo_conformance.search import search
from gxpo_conformance.trial import judge
from gxpo_reference import minimal

PORT = "gxpo_reference.ports.minimal_adapter:Port"
SOURCE = Path(minimal.__file__).read_text(encoding="utf-8")

STEPS = 24


class Untidy(torch.optim.SGD):
    """Leaves something else in .grad than it was given, as optimizers do that average in place."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach())


Base = Callable[[list[Tensor]], torch.optim.Optimizer]
BASES: dict[str, Base] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SGD, Nesterov": lambda params: torch.optim.SGD(params, lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02),
    "AdamW, AMSGrad": lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.5, 0.75), amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.02),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "one that writes into gradients": lambda params: Untidy(params, lr=0.05),
    "two groups": lambda params: torch.optim.SGD([{"params": params[:1], "lr": 0.01}, {"params": params[1:]}], lr=0.05),
}


# ------------------------------------------------------------------------------------------------------- beside gxpo.py


def points(make: Callable[[list[Tensor]], Any]) -> list[list[Tensor]]:
    """Where the gradient is asked for, step by step, of a small regression whose batches differ; last, where it ends.
    Two batches are loud. One tensor has a gradient in every second pass only, one never has any."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3), (3,), (), (2,), (5,)]
    theta = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight, bias, scale, expert, _ = theta
    opt, asked = make(theta), []

    def closure(x: Tensor, y: Tensor) -> Tensor:
        asked.append([p.detach().clone() for p in theta])
        loss = (scale * (x @ weight).tanh() @ bias - y).square().mean()
        if len(asked) % 2:
            loss = loss + expert.square().sum() / 4
        loss.backward()
        return loss

    for n in range(STEPS):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        y = 10 * y if n in (15, 16) else y
        opt.step(lambda x=x, y=y: closure(x, y))
    return [*asked, [p.detach().clone() for p in theta]]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("horizon", "alpha", "max_grad_norm"), [(5, 0.5, None), (6, 1.0, 0.3), (2, 0.8, 0.3)])
def test_it_asks_and_ends_where_gxpo_py_does(
    base: str, horizon: int, alpha: float, max_grad_norm: float | None
) -> None:
    """Two files, written apart, for one rule: where they part, one of them is not GXPO."""
    gate = {"window": 6, "threshold": 3.0, "patience": 2}

    def whole(params: list[Tensor]) -> gxpo.GXPO:
        settings = {"horizon": horizon, "alpha": alpha, "max_grad_norm": max_grad_norm}
        return gxpo.GXPO(BASES[base](params), **settings, gate=gxpo.Gate(**gate))

    def short(params: list[Tensor]) -> minimal.GXPO:
        return minimal.GXPO(BASES[base](params), horizon, alpha, max_grad_norm or math.inf, **gate)

    asked = points(short)
    assert STEPS + 1 < len(asked) < 3 * STEPS + 1  # the gate does close
    for ours, theirs in zip(asked, points(whole), strict=True):  # as many: it closes at the same step
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("horizon", [2, 3, 4, 5, 10, 11])
def test_r_and_q_are_gxpo_pys(horizon: int) -> None:
    """Where runs seldom come: at the pole, at both ends, beside nothing, and where a ratio overflows."""
    near = torch.tensor([-1e-4, -1e-7, -5e-9, 0.0, 5e-9, 1e-7, 1e-4], dtype=torch.float64)
    r = torch.cat([torch.linspace(-2, 3, 51, dtype=torch.float64), near - 1, near + 1])
    q = gxpo.extrapolation_scale(r, horizon)
    torch.testing.assert_close(minimal.extrapolation_scale(r, horizon), q, rtol=1e-12, atol=0)
    g0 = torch.tensor([1.0, 1.0, 1.0, -1.0, 9e-4, 7e-4, 0.0, 0.5], dtype=torch.float64)  # 1e-3 RMS is 7.3e-4
    g1 = torch.tensor([5.0, -5.0, 0.5, 0.5, 9e-4, 7e-4, 0.0, 1e308], dtype=torch.float64) / 0.5
    assert g1.isinf().any()
    seen = minimal.retention_ratio(g0, g1)
    assert seen.tolist() == [3, -2, 1, -1, 2, 0, 0, 0]
    torch.testing.assert_close(seen, gxpo.retention_ratio(g0, g1, g0.square().mean().sqrt().item()), rtol=0, atol=0)


def test_defaults_are_those_of_gxpo_py() -> None:
    """Who goes over from the one to the other would train something else without having changed a number."""
    theta = [torch.ones(2, requires_grad=True)]
    whole, short = gxpo.GXPO(torch.optim.SGD(theta, lr=0.1)), minimal.GXPO(torch.optim.SGD(theta, lr=0.1))
    assert (short.horizon, short.alpha) == (whole.horizon, whole.alpha)
    gate = whole.gate
    assert (short.window, short.threshold, short.patience) == (gate.window, gate.threshold, gate.patience)
    assert (gate.statistic, gate.baseline, gate.cooldown) == ("corrective_norm", "window", None)
    assert (whole.estimator, whole.optimizer_state, whole.max_grad_norm) == ("gradient", "keep", None)


# ------------------------------------------------------------------------------------------------- by what it should do


def test_it_is_conformant() -> None:
    """The page to read first would teach something that ports are rejected for."""
    verdict = judge(load(PORT))
    assert verdict.failed == []
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.exit_status == 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_cases_do_not_reject_it(dtype: str) -> None:
    """It would be right where the fixed cases look and wrong elsewhere."""
    port = load(PORT)
    harness = Harness(port, check_capabilities(port.capabilities()), dtype, "cpu")
    assert [seed for seed in range(2) if search(harness, seed, 25)] == []


@pytest.mark.parametrize("change", [{"estimator": "tensor"}, {"optimizer_state": "restore"}, {"gate": {"warmup": 3}}])
def test_its_adapter_refuses_what_it_does_not_have(change: dict[str, Any]) -> None:
    """It would be judged by a rule that it does not follow."""
    with pytest.raises(ValueError, match=r"minimal.py has \w+=.* alone, got"):
        load(PORT).start({}, config(**change))


def test_on_a_diagonal_quadratic_one_step_is_k_plus_1_plain_ones() -> None:
    """There the prediction is exact: with alpha = 1 the virtual point is where K steps lead, and a true one follows."""
    curvature = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    opt = minimal.GXPO(torch.optim.SGD([theta], lr=0.5), horizon=5, alpha=1.0)
    opt.step(lambda: (curvature * theta * theta / 2).sum().backward())
    torch.testing.assert_close(theta.detach(), (1 - 0.5 * curvature) ** 6, rtol=1e-14, atol=0)


def test_a_horizon_of_one_is_refused() -> None:
    """Two steps are what the prediction is made of."""
    with pytest.raises(ValueError, match="horizon must be at least 2, got 1"):
        minimal.GXPO(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), horizon=1)


# ------------------------------------------------------------------------------------------------------------ as a page


def test_the_example_on_top_trains() -> None:
    """It is what people try."""
    example = textwrap.dedent("\n".join(line for line in minimal.__doc__.splitlines() if line.startswith("    ")))
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 1), torch.randn(16, 3)
    before = model.weight.detach().clone()
    loss_fn = lambda model, batch: model(batch).square().mean()  # noqa: E731
    exec(example.replace("1e-6", "1e-2"), {**vars(minimal), "model": model, "batches": [batch] * 3, "loss_fn": loss_fn})
    assert not torch.equal(model.weight, before)


def test_it_stays_a_page_and_stands_alone() -> None:
    """Longer, it is a second gxpo.py; importing, neither could check the other, and it could not be copied."""
    assert len(SOURCE.splitlines()) <= 75
    nodes = list(ast.walk(ast.parse(SOURCE)))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "collections.abc", "dataclasses", "math", "torch"}
    assert "gxpo_reference" not in Path(gxpo.__file__).read_text(encoding="utf-8")
