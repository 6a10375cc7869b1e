"""Memory beyond plain training with the same optimizer, in units of the parameters' size."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from gxpo_reference.benchmarks.contenders import ACTIVE, FALLBACK, PLAIN, Contender, contenders
from gxpo_reference.benchmarks.measure import MemoryCounter, Progress, one_thread
from gxpo_reference.benchmarks.models import Problem

TARGET = {ACTIVE: "4.00", FALLBACK: "0.00"}  # two buffers and AdamW's state, which is two more


def peak_and_rest(make: Callable[[], Contender], problem: Problem, device: str) -> tuple[int, int]:
    """Bytes beyond the parameters: the most within a step (a step that is not the first, so that all optimizer state
    is there), and after it, gradients dropped.

    On CUDA the allocator's own count, which rounds every tensor up to 512 bytes; on a CPU, MemoryCounter's.
    """
    problem.clear()
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        contender = make()
        contender.step()
        torch.cuda.reset_peak_memory_stats(device)
        contender.step()
        peak = torch.cuda.max_memory_allocated(device) - before
        problem.clear()
        return peak, torch.cuda.memory_allocated(device) - before
    with one_thread(), MemoryCounter() as counter:
        contender = make()
        contender.step()
        counter.reset_peak()
        contender.step()
        peak = counter.peak
        problem.clear()
        return peak, counter.alive


def measure(problem: Problem, device: str) -> dict[str, Any]:
    progress, figures = Progress("memory"), {}
    for name, make in contenders(problem).items():
        progress.say(name)
        peak, rest = peak_and_rest(make, problem, device)
        figures[name] = {"peak_bytes": peak, "rest_bytes": rest}
    progress.end()
    plain = figures[PLAIN]
    for row in figures.values():
        row["extra_peak"] = (row["peak_bytes"] - plain["peak_bytes"]) / problem.nbytes
        row["extra_rest"] = (row["rest_bytes"] - plain["rest_bytes"]) / problem.nbytes
    return {
        "problem": str(problem),
        "parameters": problem.size,
        "parameter_bytes": problem.nbytes,
        "method": "torch.cuda.max_memory_allocated" if device.startswith("cuda") else "every storage made, counted",
        "contenders": figures,
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("parameter-sized buffers beyond plain AdamW", "peak", "between steps", "target for the peak")]
    for name, row in result["contenders"].items():
        rows.append((name, f"{row['extra_peak']:.2f}", f"{row['extra_rest']:.2f}", TARGET.get(name, "")))
    return rows
