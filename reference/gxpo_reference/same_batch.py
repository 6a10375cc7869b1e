"""Do all passes of a step see the same batch? Two gradients taken at one point say so: a check, for debugging."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALLOWED = 0.01  # of the norm: a kernel that adds in another order is far below, another batch far above


def check_same_batch(
    model: nn.Module | Iterable[Tensor], closure: Callable[[], object], *, replay_rng: bool = True
) -> float:
    """Make the gradient twice at one point. Returns by how much the two differ, relative to their norm; 0 is right.

    GXPO reads from two gradients how a step changes them; where the batch changes as well, it extrapolates noise.
    Parameters, gradients, buffers, modes and torch's random numbers are left as they were, whatever happens.

    model: a module, or its parameters (nobody then looks after buffers and modes).
    closure: what a pass does, as in GXPO.step(closure): forward and backward of the whole batch, all its micro-batches.
        What it returns does not matter.
    replay_rng: as in GXPO, the second call sees the torch random numbers of the first. Where there is no dropout, False
        sees more: rollouts that the closure samples anew.

    What changes with the parameters alone cannot be seen at one point: old log-probabilities computed in the closure.

    Raises RuntimeError where the two differ by over 1 %, where there is no gradient or none that is finite, and where
    the closure moves parameters; TypeError for arguments of the wrong kind.
    """
    given = model.parameters() if isinstance(model, nn.Module) else model
    given = given if isinstance(given, Iterable) else []
    params = [p for p in given if isinstance(p, Tensor) and p.is_leaf and p.requires_grad]
    if not params:
        raise TypeError(f"model must be a module or its parameters, which require gradients, got {type(model)}")
    if not callable(closure):
        raise TypeError(f"closure must be a function that runs forward and backward, got {type(closure)}")
    if not isinstance(replay_rng, bool):
        raise TypeError(f"replay_rng must be True or False, got {replay_rng!r}")
    random = _random_numbers(params)

    def gradient() -> list[Tensor]:
        for p in params:
            p.grad = None
        if replay_rng:
            _put_back(random)
        with torch.enable_grad():
            closure()
        if all(p.grad is None for p in params):
            raise RuntimeError("no parameter has a gradient: does the closure run backward(), on a loss of this model?")
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

    with _as_it_was(model, params, random) as theta0:
        g0 = [g.clone() for g in gradient()]
        again = gradient()
        norms = _norm(g0), _norm(again)
        off = _norm(b - a for a, b in zip(g0, again, strict=True))
        moved = not all(torch.equal(_local(p), before) for p, before in zip(params, theta0, strict=True))
    if not all(map(math.isfinite, norms)):
        raise RuntimeError(f"the gradient is not finite, its norm is {norms[0]:g}, then {norms[1]:g}: look at the loss")
    if moved:
        raise RuntimeError("the closure moves parameters: it is to make the gradient, and leave the step to GXPO")
    if off > ALLOWED * max(norms):
        numbers = "torch's are replayed, others are not" if replay_rng else "with replay_rng=True torch's are replayed"
        raise RuntimeError(
            f"two gradients at the same parameters differ by {off:.3g}, their norm is {max(norms):.3g}. Every pass has "
            "to use the same batch, rewards, advantages, old log-probabilities and random numbers: get them before the "
            f"closure, which runs forward and backward alone. (Random numbers: {numbers}.)"
        )
    return off / max(norms) if off else 0.0


def _local(t: Tensor) -> Tensor:
    """Without its graph; of a sharded tensor (DTensor) this rank's part."""
    part: Tensor = getattr(t, "to_local", lambda: t)()
    return part.detach()


def _norm(tensors: Iterable[Tensor]) -> float:
    """2-norm of all of them together, over all ranks where they are sharded."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return math.hypot(*(float(getattr(norm, "full_tensor", norm.detach)()) for norm in norms))


_Random = list[tuple[Callable[[Any], object], Any]]  # (setter, state) of each generator


def _random_numbers(params: list[Tensor]) -> _Random:
    """What GXPO replays: the CPU's generator and those of the parameters' devices."""
    states: _Random = [(torch.set_rng_state, torch.get_rng_state())]
    for device in {p.device for p in params if p.device.type != "cpu"}:
        module = getattr(torch, device.type)
        states.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return states


def _put_back(random: _Random) -> None:
    for set_state, state in random:
        set_state(state)


@contextlib.contextmanager
def _as_it_was(model: object, params: list[Tensor], random: _Random) -> Iterator[list[Tensor]]:
    """Puts everything back in the end; gives copies of the parameters."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module.named_buffers(recurse=False)]
    grads = [(p, p.grad) for p in params]
    tensors = [_local(t) for t in (*params, *(b for _, _, b in buffers), *(g for _, g in grads if g is not None))]
    copies = [t.clone() for t in tensors]
    try:
        yield copies[: len(params)]
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for p, grad in grads:
            p.grad = grad
        for t, copy in zip(tensors, copies, strict=True):
            if not torch.equal(t, copy):  # a write without need would spoil graphs that wait for their backward()
                t.copy_(copy)
        _put_back(random)
