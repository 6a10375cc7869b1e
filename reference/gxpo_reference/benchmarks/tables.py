"""Tables for people, and where the figures were taken."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import gxpo


def text(rows: list[tuple[str, ...]]) -> str:
    """Columns two spaces apart, the first to the left and figures to the right; a short row ends in free text."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[n]) for row in full) for n in range(len(rows[0]))]
    words = [not any(row[n][:1].isdigit() for row in full[1:]) for n in range(len(widths))]
    lines = []
    for row in rows:
        last = -1 if len(row) < len(widths) else len(row)  # the free text
        cells = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row[:last], widths, words, strict=False)]
        lines.append("  ".join([*cells, *row[last:]]).rstrip())
    return "\n".join(lines)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The same rows for a page: figures to the right; a short row's free text comes under its second heading."""
    full = [row for row in rows if len(row) == len(rows[0])]
    figures = [any(row[n][:1].isdigit() for row in full[1:]) for n in range(len(rows[0]))]
    padded = [(*row, *[""] * (len(rows[0]) - len(row))) for row in rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "".join("---:|" if right else "---|" for right in figures), *lines[1:]])


def environment(device: str) -> dict[str, Any]:
    return {
        "gxpo": gxpo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,  # others' work is noise here
    }
