"""A tiny problem whose steps are made to fail: all that must survive a failed step, and ways to fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gxpo import GXPO


class Restless(torch.optim.Optimizer):
    """Keeps its state as awkwardly as optimizers outside torch do: entries that come later, tensors replaced and not
    written to, nested lists, counters in the groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group[f"seen {group['k']}"] = True
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state["mean"] + p.grad if "mean" in state else p.grad.clone()
                state.setdefault("norms", []).append(p.grad.norm().item())
                state[f"step {group['k']}"] = p.detach().clone()
                p.sub_(group["lr"] * state["mean"])


def adafactor(params: list[Tensor]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip(f"torch {torch.__version__} has no Adafactor")
    return torch.optim.Adafactor(params, lr=0.1)


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=False),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "adafactor": adafactor,
    "restless": Restless,
}


class Case:
    """A tiny problem; `snapshot` holds everything that must survive a failed step, tensor identities included."""

    def __init__(self, base: Callable[..., torch.optim.Optimizer] = BASES["adamw"], **settings: Any) -> None:
        self.params = [torch.ones(3, 2, requires_grad=True), torch.full((4,), 2.0, requires_grad=True)]
        self.opt = GXPO(base(self.params), **settings)
        self.calls = 0

    def closure(self, fail_at: int = -1, how: Any = None) -> Callable[[], Tensor]:
        self.calls = 0

        def run() -> Tensor:
            self.calls += 1
            loss = sum((p * p * p).sum() for p in self.params)
            loss.backward()
            if self.calls == fail_at:
                return how(self, loss)
            return loss

        return run

    def step(self) -> None:
        self.opt.step(self.closure())

    def snapshot(self) -> dict[str, Any]:
        base = self.opt.base
        return {
            "params": [(id(p), p.detach().clone()) for p in self.params],
            "state": {
                id(p): {k: (isinstance(v, Tensor) and id(v), copy.deepcopy(v)) for k, v in s.items()}
                for p, s in base.state.items()
            },
            "groups": [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in base.param_groups],
            "gate": self.opt.gate_state,
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def refused(case: Case, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """The error, and everything as it was, and a good step afterwards."""
    before = case.snapshot()
    with pytest.raises(error, match=message):
        call()
    assert same(case.snapshot(), before)
    case.opt.step(case.closure())
    assert case.opt.report.outcome == "active"


def boom(case: Case, loss: Tensor) -> Tensor:
    raise ZeroDivisionError("out of memory, say")


def interrupt(case: Case, loss: Tensor) -> Tensor:
    raise KeyboardInterrupt
