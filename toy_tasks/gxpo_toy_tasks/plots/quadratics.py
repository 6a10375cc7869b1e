"""Pictures of the quadratic study, and one step of GXPO on a plane, still and moving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gxpo import GXPO
from gxpo_toy_tasks.plots.style import COLOURS, STYLE, save
from gxpo_toy_tasks.quadratic_study import ESTIMATORS, PROBLEMS, RATES, of, rules
from gxpo_toy_tasks.tasks.quadratics import Quadratic, plain_steps

LR, HORIZON, ALPHA = 0.3, 8, 0.7  # of the step on a plane
HUES = dict(zip(ESTIMATORS, (COLOURS["gxpo"], COLOURS["gxpo-displacement"], "#7F7F7F"), strict=True))


def errors(results: dict[str, Any]) -> Figure:
    """Error against learning rate, a panel a problem, K = 5."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, problem in zip(panels.flat, PROBLEMS, strict=True):
        for estimator in ESTIMATORS:
            wanted = {"problem": problem, "horizon": 5, "estimator": estimator, "noise": "none"}
            found = [max(of(results["errors"], lr=lr, **wanted)["error"], 1e-16) for lr in RATES]
            axes.plot(RATES, found, color=HUES[estimator], marker="o", markersize=4, label=estimator)
        axes.set(yscale="log", title=problem, ylim=(1e-17, 10))
        axes.set_xticks(RATES)
    for axes in panels[:, 0]:
        axes.set_ylabel("error")
    for axes in panels[1]:
        axes.set_xlabel("lr x largest eigenvalue")
    panels[0, 2].legend(title="estimator", loc="lower right")
    figure.suptitle(
        "How far thetaK is from the true K-step point, as a share of the way there (K = 5)", x=0.01, ha="left"
    )
    return figure


def costs(results: dict[str, Any]) -> Figure:
    """Backward passes to 1e-4 for every rule, own best rate, a panel a problem."""
    problems = list(dict.fromkeys(row["problem"] for row in results["costs"]))
    names = list(rules(results["quick"]))
    figure = Figure(figsize=(11, 0.42 * len(names) * ((len(problems) + 1) // 2) + 1.2), layout="constrained")
    panels = figure.subplots((len(problems) + 1) // 2, 2, squeeze=False, sharey=True)
    for axes, problem in zip(panels.flat, problems, strict=False):
        rows = [of(results["costs"], problem=problem, rule=name, rate="own best") for name in names]
        passes = [row["passes"] or 0 for row in rows]
        colours = [COLOURS["gxpo"] if n.startswith("GXPO") else "#9A9A9A" for n in names]
        axes.barh(names, passes, color=colours)
        for n, row in enumerate(rows):
            told = "never" if row["passes"] is None else f" {row['passes']:.0f} passes, {row['steps']:.0f} steps"
            axes.text(passes[n], n, told, va="center", fontsize=8)
        axes.set(title=problem, xlabel="backward passes", xlim=(0, 1.35 * max(passes)))
        axes.grid(axis="y", visible=False)
    panels[0, 0].invert_yaxis()
    figure.suptitle("Backward passes to 1e-4 of the first distance, each rule at its own best rate", x=0.01, ha="left")
    return figure


def plane() -> Quadratic:
    """Two dimensions, condition 6, turned."""
    return Quadratic.rotated(dim=2, condition=6.0, seed=4)


def outer_steps(n: int) -> list[dict[str, np.ndarray]]:
    """The points of `n` outer steps of the real GXPO on the plane."""
    problem = plane()
    theta = torch.from_numpy(problem.start.copy()).requires_grad_()
    opt = GXPO(torch.optim.SGD([theta], lr=LR), horizon=HORIZON, alpha=ALPHA, gate=None)
    made = []
    for _ in range(n):
        asked = []
        for _ in opt.passes():
            asked.append(theta.detach().numpy().copy())
            theta.grad = torch.from_numpy(problem.gradient({"x": asked[-1]})[1]["x"])
        theta0, theta1, tilde = asked
        theta2 = theta1 - LR * problem.gradient({"x": theta1})[1]["x"]
        made.append(
            {
                "theta0": theta0,
                "theta1": theta1,
                "theta2": theta2,
                "thetaK": theta0 + (tilde - theta0) / ALPHA,
                "theta~": tilde,
                "theta'": theta.detach().numpy().copy(),
                "path": np.stack([plain_steps(problem, theta0, LR, k) for k in range(HORIZON + 1)]),
            }
        )
    return made


NOTES = {
    "theta0": "theta0, where the step begins",
    "theta1": "theta1, one plain step",
    "theta2": "theta2, another: the gradient has changed",
    "thetaK": f"thetaK, where K = {HORIZON} steps would lead, by extrapolation",
    "theta~": f"theta~, alpha = {ALPHA} of the way; the gradient is taken here",
    "theta'": "theta', one true step from there",
}
SIGNS = {"theta0": "o", "theta1": "o", "theta2": "o", "thetaK": "X", "theta~": "s", "theta'": "D"}
HUE_OF = {"thetaK": COLOURS["gxpo-displacement"], "theta~": COLOURS["gxpo"], "theta'": COLOURS["lookahead"]}


def ground(axes: Axes) -> None:
    """Contours of the loss, equal scales."""
    problem = plane()
    reach = 1.25 * np.abs(problem.start - problem.minimum).max()
    x, y = (np.linspace(problem.minimum[i] - reach, problem.minimum[i] + reach, 120) for i in (0, 1))
    off = np.stack(np.meshgrid(x - problem.minimum[0], y - problem.minimum[1]), axis=-1)
    loss = 0.5 * np.einsum("...i,ij,...j", off, problem.matrix, off)
    axes.contour(x, y, loss, levels=loss.max() * np.geomspace(1e-3, 1, 12), colors="#D0D0D0", linewidths=0.8)
    axes.plot(*problem.minimum, marker="+", color="#666666", markersize=10)
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def put(axes: Axes, step: dict[str, np.ndarray], names: list[str], labels: bool) -> None:
    """The named points of a step, in the order they come."""
    for name in names:
        if name == "thetaK":
            axes.plot(*step["path"].T, color="#444444", linewidth=1, linestyle=":", marker=".", markersize=4)
            axes.plot(*np.stack([step["theta0"], step["thetaK"]]).T, color="#0072B2", linewidth=1, alpha=0.6)
        elif name != "theta0":
            before = {"theta1": "theta0", "theta2": "theta1", "theta'": "theta~"}.get(name)
            if before:
                axes.plot(*np.stack([step[before], step[name]]).T, color="#000000", linewidth=1.2)
        axes.plot(*step[name], marker=SIGNS[name], color=HUE_OF.get(name, "#000000"), markersize=7, linestyle="")
        if labels:
            left = name in ("theta1", "theta'", "thetaK")
            x, y = step[name]
            axes.annotate(
                name,
                (x, y),
                (-10, 5) if left else (10, -9),
                textcoords="offset points",
                ha="right" if left else "left",
            )


def near(axes: Axes, points: list[np.ndarray], margin: float) -> None:
    """A square about the points, `margin` of their extent to spare on every side."""
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    middle, half = (low + high) / 2, (0.5 + margin) * (high - low).max()
    axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))


def path() -> Figure:
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots()
    ground(axes)
    (step,) = outer_steps(1)
    put(axes, step, list(NOTES), labels=True)
    near(axes, [*step["path"], step["thetaK"]], 0.3)
    told = {"textcoords": "offset points", "color": "#444444", "fontsize": 9}
    axes.annotate(f"dotted: {HORIZON} plain steps", step["path"][-1], (10, -14), **told)
    axes.set_title("One step of GXPO on a quadratic: three gradients", loc="left")
    return figure


def animate(path: Path, steps: int = 3) -> None:
    """A GIF: every point of a few outer steps appears in turn."""
    made = outer_steps(steps)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 5.6), layout="constrained")
        axes = figure.subplots()
        frames = [(n, count) for n in range(steps) for count in range(1, len(NOTES) + 1)]
        frames += [frames[-1]] * 2

        def draw(frame: tuple[int, int]) -> None:
            n, count = frame
            axes.clear()
            ground(axes)
            for earlier in made[:n]:
                axes.plot(
                    *np.stack([earlier["theta0"], earlier["theta'"]]).T, color="#B0B0B0", marker="o", markersize=4
                )
            names = list(NOTES)[:count]
            put(axes, made[n], names, labels=n == 0)  # later steps are short: labels would overlap
            near(axes, [step["theta0"] for step in made] + [plane().minimum, made[0]["thetaK"]], 0.15)
            axes.set_title(f"step {n + 1}: {NOTES[names[-1]]}", loc="left", fontsize=9)

        writer = PillowWriter(fps=1.1)  # pyright: ignore[reportArgumentType]  # typed as an int, used as a number
        FuncAnimation(figure, draw, frames=frames, interval=900).save(path, writer=writer, dpi=90)


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture of the study; what was written."""
    with mpl.rc_context(STYLE):
        made = {"errors": errors(results), "costs": costs(results), "path": path()}
        return [p for name, figure in made.items() for p in save(figure, folder, name, results["quick"])]
