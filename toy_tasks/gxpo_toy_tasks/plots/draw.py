"""From a folder's results.json to its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gxpo_toy_tasks.plots import comparison, quadratics


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture; what was written."""
    kind = quadratics if results["kind"] == "quadratics" else comparison
    return kind.plots(results, folder)
