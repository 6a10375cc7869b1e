"""A GXPO step in plain torch around any optimizer, and a record of all that hangs on one, bit for bit.

Nothing is copied here: where the base's state has to be an earlier one, a new base makes its steps once more.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from odd_optimizers import closure_of, q_of
from torch import Tensor

Make = Callable[[list[Tensor]], Any]
HORIZON, ALPHA = 5, 0.5


# ---------------------------------------------------------------------------------------------------------- the problem


def seed(n: int) -> None:
    """Of the generators that an optimizer may draw from: anew in each step, so that no earlier one matters."""
    torch.manual_seed(n)
    np.random.seed(n)  # noqa: NPY002 (the global one is meant)
    random.seed(n)


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def set_generators(states: tuple[Any, ...]) -> None:
    for put, state in zip((torch.set_rng_state, np.random.set_state, random.setstate), states, strict=True):
        put(state)


def start(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter((t + 0.5).copysign(torch.sin(9.0 * t)).to(dtype)) for t in made]


def loss_of(params: list[Tensor]) -> Tensor:
    """No gradient is near zero, all bend, and every parameter acts on the others."""
    common = torch.stack([p.square().mean() for p in params]).sum()
    return sum((p.square() + 0.1 * p**4).sum() for p in params) + common.square()


# ------------------------------------------------------------------------------------------------------------- the step


class ByHand:
    """GXPO's step. Under "restore" the fast steps leave the base as it was, so that its state is that of a new base
    which has made the earlier last steps alone: those, at their points and with their gradients, are what is kept."""

    def __init__(self, make: Make, params: list[Tensor], policy: str, saved: dict[str, Any] | None = None) -> None:
        """`saved` is a state_dict of `make`'s, to start from."""
        self.make, self.start, self.policy, self.saved = make, [p.detach().clone() for p in params], policy, saved
        self.last_steps: list[tuple[tuple[Any, ...], list[Tensor], list[Tensor]]] = []
        self.params, self.base = self._replayed()

    def step(self, n: int) -> None:
        seed(n)
        theta0 = [p.detach().clone() for p in self.params]
        _, _, g0 = self._take_step()
        _, _, g1 = self._take_step()
        moves = [p.detach() - origin for p, origin in zip(self.params, theta0, strict=True)]
        if self.policy == "restore":
            self.params, self.base = self._replayed()
        with torch.no_grad():
            for p, origin, a, b, move in zip(self.params, theta0, g0, g1, moves, strict=True):
                p.copy_(origin.double() + ALPHA * q_of(a.double(), b.double(), HORIZON) * move.double())
        self.last_steps.append(self._take_step())

    def _take_step(self) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor]]:
        """What is needed to take it again: generators, point, gradients."""
        for p in self.params:
            p.grad = None
        loss_of(self.params).backward()
        taken = generators(), *([t.detach().clone() for t in ts] for ts in (self.params, [p.grad for p in self.params]))
        self.base.step()
        return taken

    def _replayed(self) -> tuple[list[Tensor], Any]:
        now = generators()
        params, base = built(self.make, self.start, self.saved)
        for states, point, grads in self.last_steps:
            set_generators(states)
            with torch.no_grad():
                for p, value, grad in zip(params, point, grads, strict=True):
                    p.copy_(value)
                    p.grad = grad.clone()
            base.step()
        set_generators(now)
        return params, base


def built(make: Make, values: list[Tensor], saved: dict[str, Any] | None = None) -> tuple[list[Tensor], Any]:
    params = [torch.nn.Parameter(v.detach().clone()) for v in values]
    seed(0)
    base = make(params)
    if saved is not None:
        base.load_state_dict(copied(saved))  # which may keep what it is given
    return params, base


def copied(saved: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint does it. What cannot be written to a file (functions in a group) has no tensors but torch's."""
    file = io.BytesIO()
    try:
        torch.save(saved, file)
    except (pickle.PicklingError, AttributeError):
        return copy.deepcopy(saved)
    file.seek(0)
    return torch.load(file, weights_only=False)


def take_step(opt: Any, params: list[Tensor], n: int, fail_in_pass: int = 0) -> None:
    seed(n)
    opt.step(closure_of(params, loss_of, fail_in_pass))


# ----------------------------------------------------------------------------------------------------------- the record

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
SHARED = (types.ModuleType, type, types.BuiltinFunctionType)  # belong to nobody in particular: not looked into
VALUES = (*PLAIN, tuple, frozenset, np.generic, types.MethodType)  # of these a copy is as good


class Entry(NamedTuple):
    """`thing` keeps the object alive, so that another one cannot take its place unseen."""

    kind: str
    bits: Any
    thing: Any


def record(root: Any, params: list[Tensor]) -> dict[str, Entry]:
    """Everything reachable from `root`, by the path that leads there first. Of functions, what they close over."""
    found = {f"parameter {n}": Entry("Parameter", bits(p), p) for n, p in enumerate(params)}
    names = {id(p): name for (name, entry) in found.items() for p in [entry.thing]}
    waiting = deque([("base", root), *((f"parameter {n}", vars(p)) for n, p in enumerate(params))])
    while waiting:
        path, thing = waiting.popleft()
        if isinstance(thing, PLAIN):
            found[path] = Entry(type(thing).__name__, repr(thing), thing)
        elif id(thing) in names:
            found[path] = Entry("the same as", names[id(thing)], thing)
        else:
            names[id(thing)] = path
            found[path] = Entry(type(thing).__name__, bits(thing), thing)
            waiting.extend((path + name, part) for name, part in parts(thing, names))
    return found


def differences(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """In words, none where nothing has changed: neither a bit nor which object it is."""
    found = [f"{path} is gone" for path in before.keys() - after.keys()]
    found += [f"{path} is new" for path in after.keys() - before.keys()]
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        if old[:2] != new[:2]:
            found.append(f"{path} has changed")
        elif old.thing is not new.thing and not isinstance(old.thing, VALUES):
            found.append(f"{path} is another {old.kind}")
    return sorted(found)


def bits(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        kind = thing.dtype, tuple(thing.shape), thing.requires_grad
        if hasattr(thing, "__tensor_flatten__"):
            return kind
        dense = thing.detach().contiguous().as_strided((thing.numel(),), (1,))
        return kind, thing.stride(), dense.view(torch.uint8).numpy().tobytes()
    if isinstance(thing, np.ndarray | np.generic):
        return str(thing.dtype), thing.tobytes()
    if isinstance(thing, torch.Generator):
        return thing.get_state().numpy().tobytes()
    if isinstance(thing, np.random.Generator):
        return repr(thing.bit_generator.state)
    if isinstance(thing, random.Random):
        return thing.getstate()
    return repr(thing) if type(thing).__module__ == "itertools" else None


def parts(thing: Any, names: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """What hangs on a thing, each under what has to be added to its path."""
    if isinstance(thing, SHARED):
        return
    if isinstance(thing, dict):
        for n, (key, value) in enumerate(thing.items()):
            yield f"[{names.get(id(key), n) if not isinstance(key, PLAIN) else repr(key)}]", value
    elif isinstance(thing, list | tuple | deque):
        yield from ((f"[{n}]", part) for n, part in enumerate(thing))
    elif isinstance(thing, set | frozenset):
        yield from ((f"{{{n}}}", part) for n, part in enumerate(sorted(thing, key=repr)))
    elif isinstance(thing, weakref.ref):
        yield "()", thing()
    elif isinstance(thing, functools.partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif isinstance(thing, types.MethodType):
        yield from ((".__func__", thing.__func__), (".__self__", thing.__self__))
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            yield f"<{name}>", cell.cell_contents
        return
    if isinstance(thing, Tensor) and hasattr(thing, "__tensor_flatten__"):
        yield from ((f".{name}", getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
    yield from ((f".{name}", part) for name, part in getattr(thing, "__dict__", {}).items())
    slots = (vars(kind).get("__slots__", ()) for kind in type(thing).__mro__)
    for name in (n for some in slots for n in ([some] if isinstance(some, str) else some)):
        if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
            yield f".{name}", getattr(thing, name)


def numbers(found: dict[str, Entry]) -> dict[str, Tensor]:
    """The figures of a record, for comparing what differs by rounding."""
    figures = {}
    for path, entry in found.items():
        if isinstance(entry.thing, Tensor) and not hasattr(entry.thing, "__tensor_flatten__"):
            if entry.thing.dtype not in (torch.int8, torch.uint8):  # codes, whose next may be as right
                figures[path] = entry.thing.detach().double()
        elif isinstance(entry.thing, int | float):
            figures[path] = torch.tensor(float(entry.thing), dtype=torch.float64)
    return figures
