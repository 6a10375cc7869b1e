"""One step by hand around any optimizer, failing steps, and what refusals must say: for tests of odd optimizers."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import gxpo
from gxpo import GXPO

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
Loss = Callable[[list[Tensor]], Tensor]

START = (torch.linspace(0.5, 2.0, 4, dtype=torch.float64), torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(2, 3))
REFUSAL = (TypeError, ValueError, RuntimeError)


def fresh(start: Iterable[Tensor]) -> list[Tensor]:
    return [torch.nn.Parameter(t.detach().clone()) for t in start]


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01)


def bowl(params: list[Tensor]) -> Tensor:
    return sum((p**2 + 0.1 * p**4).sum() for p in params)


def q_of(before: Tensor, after: Tensor, horizon: int) -> Tensor:
    """S_K(r) / S_2(r) between 1 and K/2 + 1; 1 where a coordinate takes no part."""
    takes_part = before.abs() > 1e-3 * before.square().mean().sqrt()
    r = torch.where(takes_part, after / before, 0.0).clamp(-2.0, 3.0)
    return (sum(r**n for n in range(horizon)) / (1 + r)).clamp(1.0, horizon / 2 + 1)


class ByHand:
    """GXPO's step in plain torch. For "restore" a copy of everything, made before the fast steps, is what goes on."""

    def __init__(
        self, make: Make, start: Iterable[Tensor], policy: str = "keep", horizon: int = 5, alpha: float = 0.5
    ) -> None:
        self.params = fresh(start)
        self.base = make(self.params)
        self.policy, self.horizon, self.alpha = policy, horizon, alpha

    def step(self, loss: Loss = bowl) -> None:
        kept = self._copy() if self.policy == "restore" else (self.params, self.base)
        theta0 = [p.detach().clone() for p in self.params]
        g0, g1 = self._fast_step(loss), self._fast_step(loss)
        moves = [p.detach() - origin for p, origin in zip(self.params, theta0, strict=True)]
        q = [1.0 if a is None or b is None else q_of(a, b, self.horizon) for a, b in zip(g0, g1, strict=True)]
        self.params, self.base = kept
        with torch.no_grad():
            for p, origin, scale, move in zip(self.params, theta0, q, moves, strict=True):
                p.copy_(origin + self.alpha * scale * move)
        self._fast_step(loss)

    def _fast_step(self, loss: Loss) -> list[Tensor | None]:
        self.base.zero_grad()
        loss(self.params).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.base.step()
        return grads

    def _copy(self) -> tuple[list[Tensor], torch.optim.Optimizer]:
        memo: dict[int, Any] = {}
        params, base = copy.deepcopy(self.params, memo), object.__new__(type(self.base))
        vars(base).update(copy.deepcopy(vars(self.base), memo))  # deepcopy(base) leaves out what torch does not know
        return params, base


def closure_of(params: list[Tensor], loss: Loss = bowl, fail_in_pass: int = 0) -> Callable[[], Tensor]:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_in_pass:
            raise ZeroDivisionError("a pass that fails")
        value = loss(params)
        value.backward()
        return value

    return closure


def fail(opt: GXPO, params: list[Tensor], loss: Loss = bowl) -> None:
    """A step that fails in its last pass: it must leave no trace."""
    with pytest.raises(ZeroDivisionError):
        opt.step(closure_of(params, loss, fail_in_pass=3))


def four_steps(
    make: Make, policy: str, with_failure: bool, right: Make | None = None, start: Iterable[Tensor] = START
) -> tuple[GXPO, list[Tensor], ByHand]:
    """Four steps around make(...), with one that fails before the third if wanted; four by hand around right(...)."""
    params = fresh(start)
    opt, hand = GXPO(make(params), gate=None, optimizer_state=policy), ByHand(right or make, start, policy)
    for n in range(4):
        if with_failure and n == 2:
            fail(opt, params)
        opt.step(closure_of(params))
        hand.step()
    return opt, params, hand


def assert_close(got: Iterable[Tensor], right: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0.0, atol=tolerance)


CASES = pytest.mark.parametrize(
    ("policy", "with_failure"),
    [("keep", True), ("restore", False), ("restore", True)],
    ids=["keep-failed step", "restore", "restore-failed step"],
)


def check_reason(error: Exception, reason: str) -> None:
    """A refusal counts as right only where it names the reason."""
    assert re.search(reason, str(error), re.IGNORECASE), f"refused, but without the reason ({reason}): {error}"


def documented(*words: str) -> bool:
    """Whether one paragraph of the docstrings or of the README (as installed) has all these words."""
    members = [member for _, member in inspect.getmembers(GXPO) if inspect.isfunction(member)]
    texts = [inspect.getdoc(thing) or "" for thing in (gxpo, GXPO, *(m for m in members if m.__module__ == "gxpo"))]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        texts.append(str(importlib.metadata.metadata("gxpo").get_payload()))
    paragraphs = re.split(r"\n\s*\n|\n[-|]|\n\s*\w+: ", "\n\n".join(texts))
    return any(all(re.search(word, paragraph, re.IGNORECASE) for word in words) for paragraph in paragraphs)
