"""A comparison in words and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gxpo_toy_tasks.measures import quartiles, rows, smoothed, speedup
from gxpo_toy_tasks.rules import ABOUT

COLUMNS = ("rule", "lr", "final", "mean", "steps", "passes", "update", "+rollouts", "paper's")
WIDE = 132  # columns of a terminal in which quartiles have room


def rate(lr: float) -> str:
    return f"{lr:.3g}"


def spread(values: np.ndarray, wide: bool = True) -> str:
    """Median and quartiles over seeds; "never" where the median seed never got there."""
    low, middle, high = quartiles(values)
    if middle == 0:
        return "never"
    return f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if wide and len(values) > 1 else "")


def comparisons(results: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, float, float]]]]:
    """(phase, heading, [(rule, grpo's rate, the rule's rate)]) for every table."""
    cells = results["cells"]
    names = [name.split("/")[1] for name in cells if name.startswith("same/")]
    made = [
        ("same", f"Every rule at lr {rate(lr)}", [(name, lr, lr) for name in names]) for lr in cells["same/grpo"]["lrs"]
    ]
    if "best/grpo" in cells:
        own = [
            (name, cells["best/grpo"]["lrs"][0], cells[f"best/{name}"]["lrs"][0])
            for name in names
            if f"best/{name}" in cells
        ]
        made.append(("best", "Every rule at its own best rate", own))
    return made


def figures(results: dict[str, Any], phase: str, name: str, grpo_lr: float, lr: float) -> dict[str, Any]:
    """A rule against GRPO, in numbers: medians over seeds."""
    grpo, cell = results["cells"][f"{phase}/grpo"], results["cells"][f"{phase}/{name}"]
    accuracy = np.array(cell["accuracy"])[rows(cell, lr)]
    found = speedup(grpo, cell, grpo_lr, lr)
    return {
        "final": float(np.median(smoothed(accuracy)[:, -1])),
        "mean": float(np.median(accuracy.mean(axis=1))),
        "speedup": found,
        "times": {key: quartiles(getattr(found, key))[1] for key in ("steps", "passes", "update", "seconds", "paper")},
    }


def tables(results: dict[str, Any], wide: bool) -> list[Table]:
    made = []
    for phase, heading, compared in comparisons(results):
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        columns = COLUMNS if wide else COLUMNS[:-1]
        for column in columns:
            table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
        for name, grpo_lr, lr in compared:
            f = figures(results, phase, name, grpo_lr, lr)
            s = f["speedup"]
            cells = [spread(v, wide) for v in (s.steps, s.passes, s.update, s.seconds, s.paper)]
            row = (name, rate(lr), f"{f['final']:.3f}", f"{f['mean']:.3f}", *cells)
            table.add_row(*row[: len(columns)])
        made.append(table)
    return made


def fewer(times: dict[str, float]) -> str:
    """In words: 4.8 times fewer steps and 1.6 times fewer passes."""

    def one(value: float, what: str) -> str:
        if value == 0:
            return f"never gets there in {what}"
        if value >= 1.05:
            return f"{value:.1f} times fewer {what}"
        return f"{1 / value:.1f} times more {what}" if value <= 0.95 else f"as many {what}"

    if times["steps"] == 0:
        return "never gets to 95 % of GRPO's peak"
    return f"needs {one(times['steps'], 'steps')} and {one(times['passes'], 'backward passes')}"


def verdict(results: dict[str, Any]) -> list[str]:
    """Sentences: where GXPO loses first."""
    said = []
    for phase, heading, compared in reversed(comparisons(results)):
        others = {name: figures(results, phase, name, grpo_lr, lr) for name, grpo_lr, lr in compared}
        mine = [name for name in others if name.startswith("gxpo")]
        if not mine:
            continue
        name = mine[0]
        where = f"With {heading[0].lower()}{heading[1:]}"
        said.append(f"{where}, {name} {fewer(others[name]['times'])} than GRPO to 95 % of GRPO's peak.")
        for other in ("grpo-scaled", "grpo-epochs", "lookahead", "sfpo"):
            if other in others:
                said.append(f"    {other} ({ABOUT[other]}) {fewer(others[other]['times'])}.")
    return said


def show(results: dict[str, Any], console: Console) -> None:
    plan = results["plan"]
    console.print(f"\n{plan['task']}: {results['about']}; K = {plan['horizon']}, alpha = {plan['alpha']:g}")
    console.print(
        "Times less than GRPO, to 95 % of the peak of its smoothed curve; median over seeds\n"
        "(with quartiles, and by the paper's definition, in a terminal of 132 columns).\n"
        "update: measured time of gradients and updates. final, mean: accuracy.",
        style="dim",
    )
    wide = console.width >= WIDE
    for table in tables(results, wide):
        console.print(table)
    for line in verdict(results):
        console.print(line, highlight=False)
