"""GXPO (arXiv 2605.06755) and nothing else, to be read; gxpo.py is the one to use.

    gxpo = GXPO(torch.optim.AdamW(model.parameters(), lr=1e-6), horizon=5, alpha=0.5)
    for batch in batches:
        gxpo.step(lambda: loss_fn(model, batch).backward())  # the same batch and old log-probabilities each time

A step that fails (a gradient that is not finite, an exception) is not undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def retention_ratio(g0: torch.Tensor, g1: torch.Tensor) -> torch.Tensor:
    """r = g1 / g0; 0, for which q is 1, where g0 is next to nothing beside the rest of its tensor."""
    takes_part = g0.abs() > 1e-3 * g0.square().mean().sqrt()
    return torch.where(takes_part, g1 / g0, 0).nan_to_num(0, 0, 0).clamp(-2, 3)


def extrapolation_scale(r: torch.Tensor, K: int) -> torch.Tensor:
    """q = S_K(r) / S_2(r), S_n(r) = 1 + r + ... + r^(n-1); with 1 + r divided out it is 1 + r^2 + r^4 + ..."""
    q = sum((r ** (2 * n) for n in range(1, K // 2)), torch.ones_like(r))
    if K % 2:  # one term is left over; at its pole, r = -1, and below it q is 1
        q = torch.where(1 + r > 1e-8, q + r ** (K - 1) / (1 + r), 1)
    return q.clamp(1, K / 2 + 1)


@dataclass
class GXPO:
    optimizer: torch.optim.Optimizer  # U; it keeps its state s itself
    horizon: int = 5  # K
    alpha: float = 0.5  # part of the way to thetaK
    max_grad_norm: float = math.inf  # C
    window: int = 30  # the gate closes when |g~| lies above the mean of so many before it
    threshold: float = 3.0  # by so many of their deviations,
    patience: int = 3  # so many times in a row
    past: list[float] = field(default_factory=list)  # every |g~|
    streak: int = 0

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ValueError(f"horizon must be at least 2, got {self.horizon}")

    def step(self, closure: Callable[[], object]) -> None:
        """One step on one batch, whose gradient `closure` makes: three times, or once when the gate has closed."""
        U, params = self.optimizer.step, [p for group in self.optimizer.param_groups for p in group["params"]]

        def gradient() -> tuple[list[torch.Tensor], float]:  # clipped, and its norm before that
            self.optimizer.zero_grad()
            closure()
            norm = torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm).item()
            return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params], norm

        g0, norm = gradient()
        theta0 = [p.detach().clone() for p in params]
        U()  # theta1
        if self.streak >= self.patience or norm == 0:  # the gate has closed, or there is nothing to extrapolate
            return
        g1, _ = gradient()
        U()  # theta2
        for theta, origin, r in zip(params, theta0, map(retention_ratio, g0, g1), strict=True):
            q = extrapolation_scale(r, self.horizon)
            theta.detach().copy_(origin + self.alpha * q * (theta.detach() - origin))  # theta~
        _, norm = gradient()
        U()  # theta'
        before = torch.tensor(self.past[: len(self.past) - self.streak][-self.window :], dtype=torch.float64)
        self.past.append(norm)
        if len(before) == self.window:
            sigma, mu = torch.std_mean(before, correction=0)
            self.streak = self.streak + 1 if (norm - mu) / (sigma + 1e-9) >= self.threshold else 0
