"""The update rules that GXPO is compared with, behind the same interface: step(closure), passes(), lookahead(), report.

Plumbing (clipping, rollback, gate, checkpoints) is gxpo.py's; what differs is the rule.
"""

from __future__ import annotations

from typing import Any

import torch

from gxpo import GXPO, Gate


class GRPO(GXPO):
    """One optimizer step a batch, one backward pass: GXPO with the gate closed from the start.

    base: a built torch optimizer. max_grad_norm: as in GXPO. Raises what GXPO raises.
    """

    def __init__(self, base: torch.optim.Optimizer, *, max_grad_norm: float | None = None) -> None:
        super().__init__(base, max_grad_norm=max_grad_norm, gate=Gate("never", max_active_steps=0))


class SFPO(GXPO):
    """Slow-Fast Policy Optimization (arXiv 2510.04072): K real fast steps, back part of the way, one corrective step.

    theta~ = theta0 + alpha (thetaK - theta0); K + 1 backward passes; the optimizer's state is kept. GXPO with K = 2 is
    this with K = 2. Defaults are the released ones: K = 3, alpha = 0.8, and a gate on the policy's entropy at theta0,
    window 30, threshold 1.0, permanent. That gate needs observe(statistic=entropy) in the first pass of every step;
    two-sided is our reading, for what is feared is the entropy's collapse.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        horizon: int = 3,
        alpha: float = 0.8,
        max_grad_norm: float | None = None,
        gate: Gate | None = Gate("supplied", window=30, threshold=1.0, patience=1, two_sided=True),
        rollback: bool = True,
        replay_rng: bool = True,
    ) -> None:
        super().__init__(
            base,
            horizon=horizon,
            alpha=alpha,
            max_grad_norm=max_grad_norm,
            gate=gate,
            rollback=rollback,
            replay_rng=replay_rng,
        )

    def _active_step(self, step: Any, g: Any) -> Any:
        """As GXPO's, with K real steps and no ratio: theta~ = theta0 + alpha (thetaK - theta0)."""
        self._keep(step)  # theta0 and s0
        for n in range(self.horizon):
            if n > 0:
                g = yield from self._gradient(step)  # gn
                if not g.finite:
                    return g
            self._clip(g)
            self.base.step()  # theta(n + 1)
            self._empty_grad(step)
        self._move(step)
        return (yield from self._gradient(step))  # g~
