"""Quadratics: how near the virtual point comes to the true K-step point, and what a solution costs.

In float64. Errors are those of the real gxpo.GXPO around torch.optim.SGD: with alpha = 1 the third point that it asks
at is thetaK, and the true K-step point has a closed form. Costs come from the batched engine, which is held against it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gxpo import GXPO
from gxpo_toy_tasks.engine import Draws, Params, Rule, Runs, train
from gxpo_toy_tasks.experiment import versions, write
from gxpo_toy_tasks.tasks.quadratics import Quadratic, plain_steps

Build = Callable[[int], Quadratic]  # seed -> problem
Noise = Callable[[int], np.ndarray]  # pass -> added to the gradient, as a share of the first gradient's norm

DIM, CAP, LEVEL, LOST, SMALL = 8, 800, 1e-4, 1e6, 0.1
QUICK_CAP = 120
HORIZONS = (2, 3, 5, 10)
RATES = (0.1, 0.5, 1.0, 1.9)  # times the largest eigenvalue, which is 1
ESTIMATORS = ("gradient", "tensor", "r = 1")
PROBLEMS: dict[str, Build] = {
    f"{kind}, condition {condition:g}": (lambda seed, b=build, c=condition: b(dim=DIM, condition=c, seed=seed))
    for kind, build in (("diagonal", Quadratic.diagonal), ("rotated", Quadratic.rotated))
    for condition in (10.0, 100.0, 1e4)
}
OWN = tuple(float(f"{r:.3g}") for r in np.geomspace(0.02, 1.95, 14))  # rates that each rule chooses its own from


def rules(quick: bool = False) -> dict[str, Rule]:
    """Every rule whose cost is counted; quick: without the dearest, and those that differ by alpha alone."""
    made = {"gradient descent": Rule("gd")}
    for k, alpha in ((3, 1.0), (5, 1.0), (10, 0.8), (10, 1.0), (10, 1.25)):
        made[f"GXPO K = {k}, alpha = {alpha:g}"] = Rule("gxpo", fast=2, horizon=k, alpha=alpha, estimator="gradient")
    made["GXPO K = 10, tensor"] = Rule("gxpo", fast=2, horizon=10, alpha=1.0, estimator="tensor")
    made |= {f"SFPO K = {k}": Rule("sfpo", fast=k, horizon=k, alpha=1.0) for k in (3, 10)}
    made["gradient descent at 11 lr"] = Rule("gd", lr_times=11.0)  # as far a step as K = 10 where nothing bends
    slow = ("SFPO K = 10", "GXPO K = 10, alpha = 0.8", "GXPO K = 10, alpha = 1.25") if quick else ()
    return {name: rule for name, rule in made.items() if name not in slow}


class Descent:
    """Quadratics as a task of the engine: a row's problem is its seed's. Implements engine.Task; `accuracy` is the
    distance to the minimum as a share of the first."""

    name = "quadratic"

    def __init__(self, build: Build) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {"x": (DIM,)}
        self.build = functools.cache(build)

    def initial(self, seeds: Sequence[int]) -> Params:
        return {"x": self.rows(seeds, "start")}

    def rows(self, seeds: Sequence[int], what: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(self.build(seed), what) for seed in seeds]))

    def rollouts(self, theta: Params, reference: Params, draws: Draws) -> Rows:
        self.latest = Rows(self.rows(draws.seeds, "matrix"), self.rows(draws.seeds, "minimum"), reference["x"])
        return self.latest

    def loss(self, theta: Params, batch: Rows) -> Tensor:
        away = theta["x"] - batch.minimum
        return 0.5 * torch.einsum("ri,rij,rj->", away, batch.matrix, away)

    def accuracy(self, theta: Params) -> Tensor:
        if self.latest is None:
            return torch.ones(len(theta["x"]))
        off, far = ((x - self.latest.minimum).norm(dim=1) for x in (theta["x"], self.latest.start))
        return off / far

    latest: Rows | None = None


@dataclass(frozen=True)
class Rows:
    """Every row's problem. matrix: (runs, dim, dim); minimum, start: (runs, dim)."""

    matrix: Tensor
    minimum: Tensor
    start: Tensor

    @property
    def entropy(self) -> Tensor:
        return torch.zeros(len(self.minimum))


def points_asked(opt: GXPO, theta: Tensor, problem: Quadratic, noise: Noise) -> list[np.ndarray]:
    """The points at which one outer step asked for gradients."""
    asked: list[np.ndarray] = []
    for n in opt.passes():
        asked.append(theta.detach().numpy().copy())
        first = problem.gradient({"x": asked[0]})[1]["x"]
        slope = problem.gradient({"x": asked[n]})[1]["x"]
        theta.grad = torch.from_numpy(slope + noise(n) * np.linalg.norm(first))
    return asked


def virtual_point(
    problem: Quadratic, lr: float, horizon: int, estimator: str, noise: Noise | None = None
) -> np.ndarray:
    """thetaK from the start. "r = 1": q = K/2 in every coordinate, what an estimator has to beat."""
    theta = torch.from_numpy(problem.start.copy()).requires_grad_()
    known = estimator if estimator != "r = 1" else "gradient"
    opt = GXPO(torch.optim.SGD([theta], lr=lr), horizon=horizon, alpha=1.0, estimator=known, gate=None)
    asked = points_asked(opt, theta, problem, noise or (lambda n: np.zeros(DIM)))
    if estimator != "r = 1":
        return asked[2]
    theta0, theta1 = asked[:2]
    theta2 = theta1 - lr * problem.gradient({"x": theta1})[1]["x"]
    return theta0 + horizon / 2 * (theta2 - theta0)


def error(problem: Quadratic, lr: float, horizon: int, point: np.ndarray) -> float:
    """How far `point` is from the true K-step point, as a share of the way there."""
    true = plain_steps(problem, problem.start, lr, horizon)
    return float(np.linalg.norm(point - true) / np.linalg.norm(true - problem.start))


def noises(seed: int, share: float) -> dict[str, Noise]:
    """Gradient noise of standard deviation `share` of |g0| over sqrt(dim): the same in all passes, or not."""
    rng = np.random.default_rng(seed)
    drawn = share / np.sqrt(DIM) * rng.standard_normal((3, DIM))
    return {"none": lambda n: np.zeros(DIM), "shared": lambda n: drawn[0], "independent": lambda n: drawn[n]}


def costs_of(
    builds: Sequence[Build], rule: Rule, lrs: Sequence[float], seeds: Sequence[int], cap: int = CAP
) -> list[list[tuple[float, float]]]:
    """(outer steps, backward passes) for every problem and rate, medians over seeds, until the distance to the minimum
    is LEVEL of the first; inf where that took more than `cap` steps, or never came."""
    many = 1 + max(seeds)
    task = Descent(lambda seed: builds[seed // many](seed % many))  # problems side by side, as seeds are
    runs = Runs([n * many + seed for n in range(len(builds)) for seed in seeds], lrs)
    there = torch.zeros(len(runs), dtype=torch.bool)

    def enough(off: Tensor) -> bool:
        """Every row is there, or so far away that it will not be."""
        there.logical_or_((off <= LEVEL) | ~(off < LOST))
        return bool(there.all())

    settings = {"optimizer": "sgd", "max_grad_norm": None, "dtype": torch.float64}
    curves = train(task, rule, runs, cap, enough=enough, **settings)
    found = []
    for row, curve in enumerate(curves.accuracy.T.numpy()):
        at = np.flatnonzero(curve <= LEVEL)
        found.append((float(at[0]), float(curves.passes[at[0], row])) if at.size else (np.inf, np.inf))
    over_seeds = np.median(np.array(found).reshape(len(lrs), len(builds), len(seeds), 2), axis=2)
    return [[tuple(rate) for rate in problem] for problem in over_seeds.swapaxes(0, 1)]


def seeds_of(quick: bool) -> range:
    return range(1 if quick else 5)


def kept(quick: bool) -> list[str]:
    """Problems whose costs are counted."""
    return [name for name in PROBLEMS if name.endswith(" 10") or (name.endswith(" 100") and not quick)]


def errors_of(name: str, quick: bool) -> list[dict[str, Any]]:
    """A problem's rows: every horizon, rate and estimator, and two kinds of noise; medians over seeds."""
    build, seeds, rows = PROBLEMS[name], seeds_of(quick), []
    for horizon in (5,) if quick else HORIZONS:
        for lr in RATES:
            for estimator in ESTIMATORS:
                found = [error(p := build(s), lr, horizon, virtual_point(p, lr, horizon, estimator)) for s in seeds]
                row = {"problem": name, "horizon": horizon, "lr": lr, "estimator": estimator}
                rows.append({**row, "noise": "none", "error": float(np.median(found))})
    for kind in ("shared", "independent"):
        found = [
            error(p := build(s), 0.5, 5, virtual_point(p, 0.5, 5, "gradient", noises(s, 0.1)[kind])) for s in seeds
        ]
        row = {"problem": name, "horizon": 5, "lr": 0.5, "estimator": "gradient", "noise": kind}
        rows.append({**row, "error": float(np.median(found))})
    return rows


def costs_with(name: str, quick: bool) -> list[dict[str, Any]]:
    """A rule's rows: every problem, at one rate for all and at the rule's own best."""
    lrs, rows = (SMALL, *(OWN[8::2] if quick else OWN)), []
    builds = [PROBLEMS[problem] for problem in kept(quick)]
    costs = costs_of(builds, rules(quick)[name], lrs, seeds_of(quick), QUICK_CAP if quick else CAP)
    for problem, found in zip(kept(quick), costs, strict=True):
        best = min(range(1, len(lrs)), key=lambda n: found[n][1])
        for kind, n in (("same", 0), ("own best", best)):
            steps, passes = (v if np.isfinite(v) else None for v in found[n])
            row = {"problem": problem, "rule": name, "rate": kind, "lr": lrs[n]}
            rows.append({**row, "steps": steps, "passes": passes})
    return rows


def study(
    quick: bool = False, on_step: Callable[[], None] = lambda: None, folder: Path | None = None
) -> dict[str, Any]:
    """Errors and costs, as JSON. Numbers that are not finite are None: never reached.

    With a folder its results.json grows problem by problem and rule by rule, and what is there is not computed again.
    ValueError where the folder holds the results of something else.
    """
    results = {"kind": "quadratics", "versions": versions(), "quick": quick, "errors": [], "costs": []}
    path = None if folder is None else folder / "results.json"
    if path is not None and path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict) or [there.get(k) for k in ("kind", "quick")] != ["quadratics", quick]:
            raise ValueError(f"{folder} holds other results: choose another --out, or delete that folder")
        results |= {what: there[what] for what in ("errors", "costs")}
    for what, key, name, compute in parts(quick):
        if not any(row[key] == name for row in results[what]):
            results[what] += compute(name, quick)
            if path is not None:
                write(path, json.dumps(results, allow_nan=False) + "\n")
        on_step()
    return results


def parts(quick: bool) -> list[tuple[str, str, str, Callable[[str, bool], list[dict[str, Any]]]]]:
    """(list of rows, the column that names the part, its name, what computes it) of all that a study consists of."""
    errors = [("errors", "problem", name, errors_of) for name in PROBLEMS]
    return errors + [("costs", "rule", name, costs_with) for name in rules(quick)]


def complete(results: dict[str, Any]) -> bool:
    return all(any(row[key] == name for row in results[what]) for what, key, name, _ in parts(results["quick"]))


# ---- In words -------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """What a terminal shows: costs first, where GXPO loses before where it wins."""
    lines = ["Steps / backward passes until the distance to the minimum is 1e-4 of the first (medians over seeds)", ""]
    problems = list(dict.fromkeys(row["problem"] for row in results["costs"]))
    for kind, heading in (
        ("same", "lr x largest eigenvalue = 0.1 for all"),
        ("own best", "each rule at its own best rate"),
    ):
        lines.append(f"{heading:<30}" + "".join(f"{p.replace('condition ', ''):>18}" for p in problems))
        for rule in rules(results["quick"]):
            cells = []
            for problem in problems:
                row = of(results["costs"], problem=problem, rule=rule, rate=kind)
                cells.append("never" if row["steps"] is None else f"{row['steps']:.0f} / {row['passes']:.0f}")
            lines.append(f"  {rule:<28}" + "".join(f"{c:>18}" for c in cells))
        lines.append("")
    lines += verdict(results, problems)
    lines += ["", "Error of thetaK against the true K-step point, as a share of the way there, K = 5:"]
    lines.append(
        f"{'':<30}" + "".join(f"{'lr ' + format(lr, 'g'):>10}" for lr in RATES) + f"{'noise 0.1 shared / not':>26}"
    )
    for problem in PROBLEMS:
        for estimator in ESTIMATORS:
            rows = [
                of(results["errors"], problem=problem, horizon=5, lr=lr, estimator=estimator, noise="none")
                for lr in RATES
            ]
            line = f"  {problem.replace('condition ', ''):<16}{estimator:<12}" + "".join(
                f"{r['error']:>10.2g}" for r in rows
            )
            if estimator == "gradient":
                noisy = [of(results["errors"], problem=problem, noise=n)["error"] for n in ("shared", "independent")]
                line += f"{noisy[0]:>18.2g} / {noisy[1]:.2g}"
            lines.append(line)
    return "\n".join(lines)


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[k] == v for k, v in wanted.items()))


def verdict(results: dict[str, Any], problems: list[str]) -> list[str]:
    said = []
    for kind, words in (("own best", "Each at its own best rate"), ("same", "At the same small rate")):
        for problem in problems:
            rows = [r for r in results["costs"] if r["problem"] == problem and r["rate"] == kind]
            plain = of(rows, rule="gradient descent")
            mine = [r for r in rows if r["rule"].startswith("GXPO") and r["passes"] is not None]
            if plain["passes"] is None or not mine:
                continue
            best = min(mine, key=lambda r: r["passes"])
            times = plain["passes"] / best["passes"]
            more = f"{times:.1f} times fewer" if times >= 1 else f"{1 / times:.1f} times MORE"
            said.append(
                (kind, times, f"{words}, {problem}: {best['rule']} needs {more} backward passes than gradient descent.")
            )
    return [text for _, _, text in sorted(said, key=lambda s: (s[0] != "own best", s[1]))]
