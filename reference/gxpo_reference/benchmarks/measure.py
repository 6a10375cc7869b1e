"""Clocks, turns and counters."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

# ------------------------------------------------------------------------------------------------------------- time


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


def now() -> float:
    return CLOCKS[clock]()


def synchronizer(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was told."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def timed(run: Callable[[], Any], sync: Callable[[], None], times: int = 1) -> float:
    """Seconds for one of `times` calls."""
    sync()
    began = now()
    for _ in range(times):
        run()
    sync()
    return (now() - began) / times


class Aside:
    """Counts the seconds that pass inside the functions it wraps, so that they can be taken off a total."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self.sync, self.seconds = sync, 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.sync()
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.sync()
                self.seconds += now() - began

        return wrapped


def summary(values: list[float]) -> dict[str, Any]:
    """All of them, their median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "quartiles": [low, high], "all": values}


class CopyFloor:
    """What it takes at least to read and write so many bytes: the better of copy_() whole and in blocks that fit a
    cache, on buffers of the parameters' size (at most 256 MiB) that are in memory already, best of five each."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.sync = synchronizer(device)
        self.source, self.target = torch.ones(2, min(nbytes, 2**28), dtype=torch.uint8, device=device)

    def seconds_per_byte(self) -> float:
        """Counting both sides: a copy of n bytes reads n and writes n."""
        ways = [self.source.numel()] if self.source.device.type != "cpu" else [self.source.numel(), 2**18]
        best = math.inf
        for block in ways:
            pairs = list(zip(self.target.split(block), self.source.split(block), strict=True))
            times = max(1, 2**22 // self.source.numel())
            for _ in range(5):
                best = min(best, timed(lambda pairs=pairs: [t.copy_(s) for t, s in pairs], self.sync, times))
        return best / (2 * self.source.numel())


class Progress:
    """One line on standard error: rewritten on a terminal, elsewhere a new one every 30 seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.said = what, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty()

    def rounds(self, rounds: int) -> Iterator[int]:
        """0 (which warms up), 1, ..., rounds."""
        for n in range(rounds + 1):
            self.say(f"round {n} of {rounds}" if n else "warming up")
            yield n
        self.end()

    def say(self, text: str) -> None:
        line = f"{self.what}: {text}, {time.monotonic() - self.began:.0f} s"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.said >= 30:
            self.said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- counts


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)


class MemoryCounter(TorchDispatchMode):
    """Bytes of the tensor storages made inside it and still alive: `alive` now, `peak` at most.

    Exact and the same on every device: each operation's results are looked at as they are made, and a finalizer on
    their storage takes the bytes off again. What an operation allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors([args, list((kwargs or {}).values())])}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._counted:  # else a view of, or written into, what was there
                self._counted.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made

    def _freed(self, cdata: int, nbytes: int) -> None:
        self._counted.discard(cdata)
        self.alive -= nbytes

    def reset_peak(self) -> None:
        self.peak = self.alive


class OperationCounter(TorchDispatchMode):
    """Operations that compute something, views not counted: kernels, on a GPU, give or take."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For counting: there is nothing to be gained by two, and on a busy machine they wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_bytes(device: str) -> int | None:
    """Memory to be had, None where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:  # Linux knows how much of its file cache it would give up
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(rows["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def bytes_paged_in() -> int:
    """Of this process so far, from memory that the system had to hand out; 0 where nobody counts."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Have glibc's malloc keep what is freed, for reuse; False where there is none. Afterwards it gives back again, by
    its documented thresholds, which no longer adapt: do nothing after it in which that would matter."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        yield False
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    try:
        yield True
    finally:
        mallopt(mmap_max, 65536)
        mallopt(trim_threshold, 128 * 1024)


def does_not_fit(needed: int, device: str) -> str:
    """Why so many bytes are not asked for; empty where they are to be had."""
    free = free_bytes(device)
    if free is None or needed < 0.9 * free:
        return ""
    return f"skipped: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
