"""One active step from its formulas, beside which gxpo.py is put, and the small problems that both take it on.

The reference is `by_hand`: a second instance of the torch optimizer does the real steps, numpy the formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gxpo import GXPO

Loss = Callable[[list[Tensor], Tensor], Tensor]
Options = dict[str, Any]
HORIZON, ALPHA, LIMIT = 5, 0.5, 2.0


def clipped(params: list[Tensor], limit: float | None) -> tuple[list[np.ndarray | None], float]:
    """The gradients as the optimizer will see them, and their norm before clipping."""
    grads = [None if p.grad is None else p.grad.double().cpu().numpy().copy() for p in params]
    norm = float(np.sqrt(sum((g**2).sum() for g in grads if g is not None)))
    c = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    for p in params:
        if p.grad is not None:
            p.grad *= c
    return [None if g is None else c * g for g in grads], norm


def by_hand(
    params: list[Tensor],
    base: torch.optim.Optimizer,
    loss: Loss,
    x: Tensor,
    policy: str = "keep",
    limit: float | None = LIMIT,
) -> tuple[list[Tensor], torch.optim.Optimizer, list[float], float]:
    """One active step from its formulas: new parameters and optimizer (the given ones are used up), norms, mean q."""
    theta0 = [p.detach().double().cpu().numpy().copy() for p in params]
    fast, fast_base = copy.deepcopy((params, base))
    pairs, norms = [], []
    for _ in range(2):
        fast_base.zero_grad()
        loss(fast, x).backward()
        g, norm = clipped(fast, limit)
        pairs.append(g)
        norms.append(norm)
        fast_base.step()

    ends, scales = [], []
    for p, origin, before, after in zip(fast, theta0, *pairs, strict=True):
        if before is None or after is None:
            q = np.ones_like(origin)
        else:
            active = np.abs(before) > 1e-3 * np.sqrt(np.mean(before**2))
            r = np.clip(np.where(active, after / np.where(active, before, 1.0), 0.0), -2.0, 3.0)
            q = np.clip(sum(r**n for n in range(HORIZON)) / (1.0 + r), 1.0, HORIZON / 2 + 1)
        ends.append(torch.from_numpy(np.asarray(origin + ALPHA * q * (p.detach().double().cpu().numpy() - origin))))
        if before is not None:
            scales.append(q.ravel())

    if policy == "keep":
        params, base = fast, fast_base
    with torch.no_grad():
        for p, end in zip(params, ends, strict=True):
            p.copy_(end)
    base.zero_grad()
    loss(params, x).backward()
    norms.append(clipped(params, limit)[1])
    base.step()
    return params, base, norms, float(np.concatenate(scales).mean())


# --------------------------------------------------------------------------------------------------------- the problems


def matrices(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [0.4 * torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 8), (8, 3))]
    return [p.to(device, dtype).requires_grad_() for p in made]


def with_biases(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    biases = [torch.full((n,), 0.1, device=device, dtype=dtype, requires_grad=True) for n in (8, 3)]
    return matrices(device, dtype) + biases


def mlp(params: list[Tensor], x: Tensor) -> Tensor:
    """Two layers, biases or not. Steps of the tests' sizes change its gradient, so that r is not 1."""
    first, second, *biases = params
    hidden = x @ first + (biases[0] if biases else 0.0)
    return 3.0 * (hidden.tanh() @ second + (biases[1] if biases else 0.0) - x[:, :3].sin()).square().mean()


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def batches(n: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 6, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(n)]


def step(opt: GXPO, params: list[Tensor], x: Tensor, loss: Loss = mlp) -> None:
    def closure() -> Tensor:
        value = loss(params, x)
        value.backward()
        return value

    opt.step(closure)


def values(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def snapshot(base: torch.optim.Optimizer, params: list[Tensor]) -> str:
    """Everything that a failed step has to put back, to the last bit."""

    def plain(entries: Any) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in entries.items() if k != "params"}

    return repr((plain(dict(enumerate(params))), [plain(d) for d in (*base.state.values(), *base.param_groups)]))


# ------------------------------------------------------------------------------------------------------------ comparing


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=tolerance, atol=tolerance)


def close_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for one, other in zip(a.state.values(), b.state.values(), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, Tensor):
                close([value], [other[key]], 1e-10 if value.dtype == torch.float64 else 1e-6)
            else:
                assert value == other[key], key
