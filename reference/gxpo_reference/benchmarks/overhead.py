"""What GXPO adds to three plain steps, as a share of them, where gradients cost nothing.

A plain step is zero_grad(), a gradient, clip_grad_norm_(foreach=True) to norm 1 and AdamW(foreach=True).step(); GXPO's
is its step(closure) around the same AdamW with max_grad_norm=1 and the gate off, three passes. On one thread.

Three gradients are made beforehand, for the three passes of either side. Handing one out is `p.grad = g` for every
parameter, by the same function on both sides; it is timed with the rest, for nothing can be taken off where a GPU works
in the background, and is 0 to 2 % of the plain steps, so that shares are too small by as much. Either side clips in
place: before each turn, untimed, every gradient is scaled back to the norm that it began with. Left as they are, they
would have norm 1 from the second turn on, where GXPO has nothing to clip and torch multiplies by 1 all the same. What a
backward pass costs besides arithmetic, memory for new gradients say, is on neither side.

Large tensors are dear in a way of their own on a CPU: what a step allocates and frees, glibc may give back to the
system, which then hands out new pages, zeroed one by one. Whether it does depends on what else lies in the heap, not on
GXPO: the same steps have taken 0.6 to 1.7 of three plain ones. So each row is measured as memory comes, and with freed
memory kept, as other allocators and CUDA's do; how much was paged in stands beside it.

A pair is a turn of each, one right after the other, and who begins changes from pair to pair. The share is
(GXPO's - plain) / plain, one a pair. GXPO has to read and write 13 numbers a parameter beyond what the plain steps do
(17 with optimizer_state="restore"), which have to read and write 30: 0.43 (0.57) is what shares come to where every
byte is moved once and nothing else costs time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gxpo import GXPO
from gxpo_reference.benchmarks.measure import (
    Progress,
    bytes_paged_in,
    does_not_fit,
    freed_memory_kept,
    one_thread,
    summary,
    synchronizer,
    timed,
)
from gxpo_reference.benchmarks.models import Shapes, tensors

SHAPES: dict[str, Shapes] = {
    "matrices: 12 of 1024 x 1024": [(1024, 1024)] * 12,
    "LoRA: 400 of 8 x 1024": [(8, 1024)] * 400,
    "vectors: 400 of 1024": [(1024,)] * 400,
    "small: 1,200 of 64": [(64,)] * 1200,
}
QUICK: dict[str, Shapes] = {"matrices: 2 of 64 x 64": [(64, 64)] * 2, "small: 40 of 64": [(64,)] * 40}
TARGET = dict(zip(SHAPES, (0.6, 0.6, 0.8, 0.8), strict=True))
NUMBERS_KEPT = 15  # per parameter, at the peak: theta, three gradients, AdamW's state twice, GXPO's four, temporaries
MAX_NORM = 1.0
TURN, PAIRS = 1.0, 20  # seconds of pairs that a round has at least, by repeating them up to so many times


class Gradients:
    """Three for every parameter, handed out in turn."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params, self.next = params, 0
        self.passes = [[torch.randn_like(p) * (1.0 - 0.1 * n) for p in params] for n in range(3)]
        self.norms = [self._norm(grads) for grads in self.passes]

    @staticmethod
    def _norm(grads: list[Tensor]) -> float:
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))

    def hand_out(self) -> None:
        for p, g in zip(self.params, self.passes[self.next], strict=True):
            p.grad = g
        self.next = (self.next + 1) % 3

    def renew(self) -> None:
        """As they were before anybody clipped them."""
        self.next = 0
        for grads, norm in zip(self.passes, self.norms, strict=True):
            scale = norm / self._norm(grads)
            for g in grads:
                g.mul_(scale)
        for p in self.params:
            p.grad = None


def sides(params: list[torch.nn.Parameter], grads: Gradients, policy: str) -> dict[str, Callable[[], Any]]:
    """What takes turns: three plain steps, and one of GXPO's."""
    base = torch.optim.AdamW(params, lr=1e-5, foreach=True)
    wrapped = torch.optim.AdamW(params, lr=1e-5, foreach=True)
    opt = GXPO(wrapped, max_grad_norm=MAX_NORM, optimizer_state=policy, gate=None)
    loss = torch.zeros((), device=params[0].device)

    def plain() -> None:
        for _ in range(3):
            base.zero_grad()
            grads.hand_out()
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            base.step()

    def closure() -> Tensor:
        grads.hand_out()
        return loss

    return {"plain": plain, "own": lambda: opt.step(closure)}


def shares(shapes: Shapes, policy: str, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    params = tensors(shapes, device, dtype).params
    grads, sync = Gradients(params), synchronizer(device)
    turns = sides(params, grads, policy)
    paged = dict.fromkeys(turns, 0)

    def turn(who: str) -> float:
        grads.renew()
        before = bytes_paged_in()
        seconds = timed(turns[who], sync)
        paged[who] += bytes_paged_in() - before
        return seconds

    for who in turns:
        turn(who)  # makes the optimizers' state
    pairs = min(PAIRS, max(1, math.ceil(TURN / sum(turn(who) for who in turns))))
    took: dict[str, list[float]] = {who: [] for who in turns}
    for n in Progress(f"overhead, {len(shapes)} tensors, {policy}").rounds(rounds):
        if n == 1:  # the first round warms up
            took, paged = {who: [] for who in turns}, dict.fromkeys(turns, 0)
        for at in range(pairs):
            for who in ("plain", "own") if (n + at) % 2 else ("own", "plain"):
                took[who].append(turn(who))
    return {
        "plain_seconds": summary(took["plain"]),
        "seconds": summary(took["own"]),
        "share": summary([(own - plain) / plain for own, plain in zip(took["own"], took["plain"], strict=True)]),
        "plain_paged_in": paged["plain"] / len(took["plain"]),
        "paged_in": paged["own"] / len(took["own"]),
    }


def measure(
    wanted: dict[str, Shapes], policies: Sequence[str], device: str, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    def rows(memory: str) -> Iterable[dict[str, Any]]:
        for name, shapes in wanted.items():
            size = sum(math.prod(shape) for shape in shapes)
            lack = does_not_fit(NUMBERS_KEPT * size * dtype.itemsize, device)
            for policy in policies:
                row: dict[str, Any] = {"shapes": name, "optimizer_state": policy, "freed_memory": memory}
                row |= {"tensors": len(shapes), "parameters": size, "dtype": str(dtype).removeprefix("torch.")}
                yield row | ({"skipped": lack} if lack else shares(shapes, policy, device, dtype, rounds))
                gc.collect()

    with one_thread():
        found = list(rows("as it comes"))
        if device == "cpu":
            with freed_memory_kept() as kept:
                found += rows("kept") if kept else []
    return sorted(found, key=lambda row: (list(wanted).index(row["shapes"]), row["optimizer_state"]))


def table(result: list[dict[str, Any]], device: str) -> list[tuple[str, ...]]:
    head = ("tensors", "freed memory", "3 plain steps, ms", "GXPO's step, ms", "share added")
    rows: list[tuple[str, ...]] = [(*head, "quartiles", "paged in, MB", "target")]
    for row in result:
        policy = "" if row["optimizer_state"] == "keep" else f", {row['optimizer_state']}"
        names = (row["shapes"] + policy, row["freed_memory"] if device == "cpu" else "")
        if "skipped" in row:
            rows.append((*names, row["skipped"]))
            continue
        low, high = row["share"]["quartiles"]
        aimed = not policy and device == "cpu" and row["dtype"] == "float32"
        rows.append(
            (
                *names,
                f"{1e3 * row['plain_seconds']['median']:.2f}",
                f"{1e3 * row['seconds']['median']:.2f}",
                f"{row['share']['median']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{row['plain_paged_in'] / 1e6:.0f}, {row['paged_in'] / 1e6:.0f}" if device == "cpu" else "",
                f"{TARGET[row['shapes']]}" if aimed and row["shapes"] in TARGET else "",
            )
        )
    return rows
