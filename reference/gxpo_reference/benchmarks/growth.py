"""The same ratios from small to large."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from gxpo_reference.benchmarks import stages, steps
from gxpo_reference.benchmarks.contenders import ACTIVE, FALLBACK
from gxpo_reference.benchmarks.measure import does_not_fit
from gxpo_reference.benchmarks.models import SIZES, Problem, big_tensors, transformer

NUMBERS_KEPT = 16  # per parameter, at the peak: theta, gradient, AdamW's state thrice, GXPO's four, temporaries, floor


def problems(sizes: list[int], batch: int, device: str, dtype: torch.dtype) -> Iterator[tuple[str, int, Problem | str]]:
    """A kind, a size and a problem or the reason why there is none. Big tensors have the cheapest backward pass there
    can be, so their ratio is the worst one; a transformer's is what one would meet."""
    for size in sizes:
        lack = does_not_fit(NUMBERS_KEPT * size * dtype.itemsize, device)
        yield "big tensors", size, lack or big_tensors(size, device, dtype)
        if size in SIZES:
            slow = "skipped: minutes a step on a CPU" if device == "cpu" and size > 10**7 else ""
            yield "transformer", size, slow or lack or transformer(*SIZES[size], batch, device, dtype)


def measure(sizes: list[int], batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for kind, size, problem in problems(sizes, batch, device, dtype):
        row: dict[str, Any] = {"kind": kind, "size": size}
        if isinstance(problem, str):
            row["skipped"] = problem
        else:
            row["steps"] = steps.measure(problem, device, rounds, (ACTIVE, FALLBACK))
            row["stages"] = stages.measure(problem, device, rounds, (ACTIVE,))
        rows.append(row)
        del problem
        gc.collect()
    return rows


def table(result: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "parameters", "active step", "/ 3 plain", "fallback / plain", "stages", "ns a parameter", "stages / floor")
    ]
    for row in result:
        if "skipped" in row:
            rows.append((row["kind"], f"{row['size']:,}", row["skipped"]))
            continue
        active, fallback = (row["steps"]["contenders"][name] for name in (ACTIVE, FALLBACK))
        stage = row["stages"]["settings"][ACTIVE]["all"]
        rows.append(
            (
                row["kind"],
                f"{row['steps']['parameters']:,}",
                f"{1e3 * active['seconds']['median']:.2f} ms",
                f"{active['ratio']['median']:.3f}",
                f"{fallback['ratio']['median']:.3f}",
                f"{1e3 * stage['seconds']['median']:.2f} ms",
                f"{1e9 * stage['seconds']['median'] / row['steps']['parameters']:.2f}",
                f"{stage['ratio']['median']:.2f}",
            )
        )
    return rows
