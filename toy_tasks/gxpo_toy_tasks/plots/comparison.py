"""The pictures of a comparison, drawn from results.json: `gxpo-toys plot DIR` draws them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gxpo_toy_tasks.measures import quartiles, rows, speedup
from gxpo_toy_tasks.plots.style import COLOURS, STYLE, save
from gxpo_toy_tasks.tables import comparisons, rate


def width(name: str) -> float:
    return 2.4 if name == "gxpo" else 1.4


def dash(name: str) -> str:
    """A gate that never trips leaves GXPO's own curve, which has to be seen beneath."""
    return "--" if name == "gxpo-gate" else "-"


def band(axes: Axes, x: np.ndarray, curves: np.ndarray, name: str) -> None:
    """Median and quartiles over seeds."""
    low, middle, high = np.percentile(curves, [25, 50, 75], axis=0)
    axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.plot(x, middle, color=COLOURS[name], linewidth=width(name), linestyle=dash(name), label=name)


def learning(results: dict[str, Any]) -> Figure:
    """Accuracy against steps beside accuracy against passes, a row a comparison."""
    compared = comparisons(results)
    figure = Figure(figsize=(11, 3.6 * len(compared)), layout="constrained")
    grid = figure.subplots(len(compared), 2, squeeze=False, sharey=True)
    for line, (phase, heading, names) in zip(grid, compared, strict=True):
        least = min(max(results["cells"][f"{phase}/{name}"]["passes"][0]) for name, _, _ in names)
        for name, _, lr in names:
            cell = results["cells"][f"{phase}/{name}"]
            at = rows(cell, lr)
            accuracy, passes = np.array(cell["accuracy"])[at], np.array(cell["passes"])[at]
            band(line[0], np.arange(accuracy.shape[1]), accuracy, name)
            ticks = np.arange(least + 1)  # up to what plain GRPO spends: there all can be compared
            at_pass = [np.interp(ticks, p, a) for p, a in zip(passes, accuracy, strict=True)]
            band(line[1], ticks, np.array(at_pass), name)
        line[0].set(xlabel="outer steps", ylabel="accuracy", title=heading)
        line[1].set(xlabel="backward passes", title="the same, by what it costs")
        told = [f"{name}, lr {rate(lr)}" if phase == "best" else name for name, _, lr in names]
        line[1].legend(line[1].get_lines(), told, loc="center left", bbox_to_anchor=(1.01, 0.5))
        until = settled(results, phase, names)
        line[0].set_xlim(0, until)
        line[1].set_xlim(0, min(least, 3 * until))
    figure.suptitle(title(results), x=0.01, ha="left")
    return figure


def settled(results: dict[str, Any], phase: str, names: list[tuple[str, float, float]]) -> int:
    """The step by which the slowest rule's median is within 2 % of its highest; what follows is a line."""
    last = 0
    for name, _, lr in names:
        cell = results["cells"][f"{phase}/{name}"]
        middle = np.median(np.array(cell["accuracy"])[rows(cell, lr)], axis=0)
        last = max(last, int(np.argmax(middle >= 0.98 * middle.max())))
    return min(int(1.3 * last) + 2, len(middle) - 1)


def title(results: dict[str, Any]) -> str:
    plan = results["plan"]
    setting = f"K = {plan['horizon']}, alpha = {plan['alpha']:g}, {plan['optimizer']}"
    return f"{plan['task']}: {results['about']}; {setting}; median and quartiles over seeds"


def by_rate(results: dict[str, Any]) -> Figure | None:
    """Speedup over GRPO at the same rate, along the rates of the tuning phase."""
    cells = {name.split("/")[1]: cell for name, cell in results["cells"].items() if name.startswith("tune/")}
    if "grpo" not in cells:
        return None
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, ("steps", "passes"), strict=True):
        for name, cell in cells.items():
            lrs = cell["lrs"]
            found = [getattr(speedup(cells["grpo"], cell, lr, lr), what) for lr in lrs]
            low, middle, high = np.array([quartiles(v) for v in found]).T
            axes.fill_between(lrs, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            axes.plot(
                lrs,
                middle,
                color=COLOURS[name],
                linewidth=width(name),
                linestyle=dash(name),
                marker="o",
                markersize=3.5,
                label=name,
            )
        axes.axhline(1.0, color="#999999", linewidth=0.8)
        axes.set(xscale="log", xlabel="learning rate, the same for both", ylim=(0, None))
        axes.set_title("times fewer steps than GRPO" if what == "steps" else "times fewer backward passes than GRPO")
        axes.set_xticks(lrs, [rate(lr) for lr in lrs], rotation=45)
        axes.minorticks_off()
    panels[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(
        "Speedup against learning rate, to 95 % of GRPO's peak at that rate; 0: never reached", x=0.01, ha="left"
    )
    return figure


def inside(results: dict[str, Any]) -> Figure | None:
    """What q was, and what the gate saw, of the first GXPO rule with each."""
    cells = results["cells"]
    names = [name.split("/")[1] for name in cells if name.startswith("same/gxpo")]
    if not names:
        return None
    lr = cells["same/grpo"]["lrs"][0]
    gated = next((n for n in names if any(z is not None for run in cells[f"same/{n}"]["z"] for z in run)), None)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    cell = cells[f"same/{names[0]}"]
    q = np.array(cell["q"], dtype=float)[rows(cell, lr)]  # (runs, steps, quantiles)
    middle = np.nanmedian(q, axis=0)
    steps = np.arange(len(middle))
    for low, high, alpha in ((0, 4, 0.15), (1, 3, 0.3)):
        left.fill_between(steps, middle[:, low], middle[:, high], color=COLOURS["gxpo"], alpha=alpha, linewidth=0)
    left.plot(steps, middle[:, 2], color=COLOURS["gxpo"], linewidth=1.6)
    half = results["plan"]["horizon"] / 2
    left.axhline(half, color="#999999", linewidth=0.8)
    left.annotate("K/2: nothing bends", (steps[-1], half), ha="right", va="bottom", fontsize=8, color="#666666")
    left.set(xlabel="outer steps", ylabel="q", ylim=(0.9, half + 1.1))
    left.set_title(f"{names[0]} at lr {rate(lr)}: q over coordinates, median, 50 % and 90 %")
    if gated is None:
        right.text(0.5, 0.5, "no rule with a gate in this comparison\n(add gxpo-gate)", ha="center", va="center")
        right.set_axis_off()
        return figure
    cell = cells[f"same/{gated}"]
    for run in rows(cell, lr):
        z = np.array(cell["z"][run], dtype=float)
        right.plot(z, color=COLOURS[gated], linewidth=0.9, alpha=0.7)
        if cell["first_single"][run] is not None:
            right.axvline(cell["first_single"][run], color=COLOURS[gated], linewidth=0.8, linestyle=":")
    right.axhline(3.0, color="#999999", linewidth=0.8)
    right.set(xlabel="outer steps", ylabel="z", ylim=(-6, 10), xlim=(0, results_length(cell)))
    right.set_title(f"{gated}: the gate's score of each run, dotted where it fell back")
    return figure


def results_length(cell: dict[str, Any]) -> int:
    return len(cell["accuracy"][0]) - 1


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture of a comparison; what was written."""
    with mpl.rc_context(STYLE):
        made = {"learning": learning(results), "by_rate": by_rate(results), "inside": inside(results)}
        quick = results["plan"]["quick"]
        return [
            path for name, figure in made.items() if figure is not None for path in save(figure, folder, name, quick)
        ]
