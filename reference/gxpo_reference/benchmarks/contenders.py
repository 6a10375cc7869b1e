"""What takes turns: plain steps, GXPO with each of its settings, SFPO, and GXPO as one would first write it down."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gxpo import GXPO, Gate
from gxpo_reference.baselines import SFPO
from gxpo_reference.benchmarks.models import Problem

LEARNING_RATE = 1e-5  # small: hundreds of steps on one batch must not arrive anywhere
MAX_NORM = 0.01  # so small that every gradient is clipped, which is the dearer case
HORIZON = 5

SETTINGS: dict[str, dict[str, Any]] = {
    "GXPO": {},
    "GXPO, rollback=False": {"rollback": False},
    "GXPO, displacement": {"estimator": "displacement"},
    "GXPO, tensor": {"estimator": "tensor"},
    "GXPO, restore": {"optimizer_state": "restore"},
}
PLAIN, ACTIVE, FALLBACK, TEXTBOOK, SFPO_5 = "plain, clipped", "GXPO", "GXPO, after fallback", "textbook", "SFPO, K = 5"


@dataclass(frozen=True)
class Contender:
    step: Callable[[], Any]  # one outer step
    plain_steps: int  # of the same number of backward passes, which it is compared with


def adamw(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.AdamW(problem.params, lr=LEARNING_RATE)


def gxpo(problem: Problem, **settings: Any) -> GXPO:
    return GXPO(adamw(problem), horizon=HORIZON, max_grad_norm=MAX_NORM, **{"gate": None, **settings})


def contenders(problem: Problem) -> dict[str, Callable[[], Contender]]:
    """Makers, by name, the plain step first: each makes an optimizer of its own around the same parameters."""

    def plain() -> Contender:
        base = adamw(problem)

        def step() -> None:
            base.zero_grad()
            problem.backward()
            torch.nn.utils.clip_grad_norm_(problem.params, MAX_NORM)
            base.step()

        return Contender(step, 1)

    def active(name: str) -> Contender:
        opt = gxpo(problem, **SETTINGS[name])
        return Contender(lambda: opt.step(problem.backward), 3)

    def fallback() -> Contender:
        opt = gxpo(problem, gate=Gate("never", max_active_steps=1))
        problem.clear()
        opt.step(problem.backward)  # its one active step
        return Contender(lambda: opt.step(problem.backward), 1)

    def sfpo() -> Contender:
        opt = SFPO(adamw(problem), horizon=HORIZON, max_grad_norm=MAX_NORM, gate=None)
        return Contender(lambda: opt.step(problem.backward), HORIZON + 1)

    def textbook() -> Contender:
        opt = Textbook(problem)
        return Contender(opt.step, 3)

    makers: dict[str, Callable[[], Contender]] = {PLAIN: plain}
    makers |= {name: lambda name=name: active(name) for name in SETTINGS}
    return {**makers, FALLBACK: fallback, TEXTBOOK: textbook, SFPO_5: sfpo}


# ------------------------------------------------------------------------------------------- as first written down


def textbook_scale(r: Tensor, horizon: int) -> Tensor:
    """q = S_K(r) / S_2(r) in closed form: wrong near r = 1 and r = -1, the same as GXPO's elsewhere."""
    q = ((1 - r**horizon) / (1 - r + 1e-8)) / (1 + r)
    return torch.nan_to_num(q, 1.0).clamp(1.0, horizon / 2 + 1)


class Textbook:
    """The same step with whole tensors and nothing saved: three buffers anew each step, a copy of the state, closed
    form, no checks, no gate, no way back. What a careful GXPO has to be no dearer than."""

    def __init__(self, problem: Problem, alpha: float = 0.5) -> None:
        self.problem, self.alpha, self.base = problem, alpha, adamw(problem)

    def _gradient(self) -> None:
        self.base.zero_grad()
        self.problem.backward()
        torch.nn.utils.clip_grad_norm_(self.problem.params, MAX_NORM)

    def step(self) -> None:
        params = self.problem.params
        self._gradient()
        theta0 = [p.detach().clone() for p in params]
        g0 = [p.grad.clone() for p in params if p.grad is not None]
        saved = deepcopy(self.base.state_dict())  # to go back to, had anybody checked
        self.base.step()
        self._gradient()
        g1 = [p.grad.clone() for p in params if p.grad is not None]
        self.base.step()
        with torch.no_grad():
            for p, origin, before, after in zip(params, theta0, g0, g1, strict=True):
                kept = before.abs() > 1e-3 * before.square().mean().sqrt()
                r = torch.where(kept, after / before, torch.zeros_like(before)).clamp(-2.0, 3.0)
                p.copy_(origin + self.alpha * textbook_scale(r, HORIZON) * (p - origin))
        self._gradient()
        self.base.step()
        del saved
