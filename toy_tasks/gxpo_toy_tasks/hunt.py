"""Where does tuned GXPO need fewer backward passes than tuned GRPO? python -m gxpo_toy_tasks.hunt

Tries many settings of GXPO on each task, each at the rate that is best for it, prints the tables of RESULTS.md and
writes a copy of that page with these numbers in it.
A level is 95 % of the highest that GRPO came to at any rate; other rules may spend twice the backward passes that it
might. A rule's rate is the one whose worst tuning seed got there with the fewest passes, so that no rule is judged at
the edge of its stability; what is shown was then measured with ten other seeds.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

try:
    import torch
except ModuleNotFoundError as missing:
    sys.exit(f"gxpo_toy_tasks.hunt needs {missing.name}: pip install torch")

from gxpo import Gate
from gxpo_toy_tasks.engine import Rule, Runs, train
from gxpo_toy_tasks.experiment import TUNE_SEEDS
from gxpo_toy_tasks.measures import LEVEL, NEVER, first_at, quartiles, smoothed
from gxpo_toy_tasks.rules import rules
from gxpo_toy_tasks.tasks.table import TASKS, rates

PAGE = Path(__file__).with_name("RESULTS.md")
TEST_SEEDS = tuple(range(10))
SEEDS = (*TUNE_SEEDS, 1003, 1004)  # for tuning


def gxpo(horizon: int, alpha: float, **more: object) -> Rule:
    known = rules(horizon, alpha)["gxpo"]
    return replace(known, **more)


def gated(rule: Rule, **gate: object) -> Rule:
    return replace(rule, gate=Gate(**{"statistic": "never", **gate}))


SPREAD = {f"GXPO K = {k}, alpha = {a:g}": gxpo(k, a) for k in (3, 5, 10) for a in (0.8, 1.5)}
EARLY = {f"GXPO K = 5 in the first {n} steps": gated(gxpo(5, 0.8), max_active_steps=n) for n in (2, 5, 15, 40)}
EARLY |= {f"GXPO K = 10 in the first {n} steps": gated(gxpo(10, 1.0), max_active_steps=n) for n in (5, 15)}
KINDS = {
    "GXPO K = 5, displacement": gxpo(5, 0.8, estimator="displacement"),
    "GXPO K = 5, tensor": gxpo(5, 0.8, estimator="tensor"),
    "GXPO K = 5, restore": gxpo(5, 0.8, optimizer_state="restore"),
    "GXPO K = 5, norm gate": gated(gxpo(5, 0.8), statistic="corrective_norm", window=10, threshold=2.0, patience=1),
    "GXPO K = 5, disagreement gate": gated(
        gxpo(5, 0.8), statistic="disagreement", window=10, threshold=1.0, patience=1
    ),
}
OTHERS = {
    "GRPO": Rule("grpo"),
    "GRPO, 3 epochs": Rule("grpo-epochs", epochs=3),
    "SFPO": rules(5, 0.8)["sfpo"],
}
FAR = {f"GXPO K = {k}, alpha = {a:g}": gxpo(k, a) for k in (5, 10, 20, 40, 80) for a in (0.8, 1.0, 1.5)}
FAR |= {"GXPO K = 40, alpha = 1, tensor": gxpo(40, 1.0, estimator="tensor")}
FAR |= {"10 real steps (SFPO K = 10)": rules(10, 1.0)["lookahead"]}
NEAR = {**OTHERS, **{name: rule for name, rule in FAR.items() if rule.horizon <= 40 and rule.fast == 2}}


@dataclass(frozen=True)
class Search:
    """One table: a task, an optimizer, the rates and the rules that are tried."""

    task: str
    optimizer: str
    grid: tuple[float, ...]
    passes: int  # that a run of GRPO may spend
    tried: dict[str, Rule]

    def steps(self, rule: Rule) -> int:
        early = rule.gate.max_active_steps
        if rule.passes == 1 or early is not None:
            return self.passes
        return 2 * self.passes // rule.passes


SEARCHES = {
    "contextual-adamw": Search("contextual", "adamw", rates(8e-3, 7), 120, {**OTHERS, **SPREAD, **EARLY, **KINDS}),
    "contextual-sgd": Search("contextual", "sgd", rates(0.5, 6), 120, {**OTHERS, **SPREAD, **EARLY}),
    "sort3-adamw": Search("sort3", "adamw", rates(1.2e-3, 5), 360, {**OTHERS, **SPREAD, **EARLY, **KINDS}),
    "steep-sgd": Search("steep", "sgd", (1.0, 2.0, 4.0, 8.0, 11.0, 16.0, 22.0, 32.0), 600, {**OTHERS, **FAR}),
    "steep-momentum": Search("steep", "momentum", (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0), 800, NEAR),
    "steep-adamw": Search("steep", "adamw", rates(0.02, 7), 200, NEAR),
}


@dataclass(frozen=True)
class Found:
    """A rule at its best rate, measured with the test seeds."""

    rule: str
    lr: float
    passes: np.ndarray  # of every seed, to the level; NEVER

    @property
    def median(self) -> float:
        return float(np.median(self.passes))


def passes_to(level: float, accuracy: torch.Tensor, passes: torch.Tensor) -> np.ndarray:
    """(runs,): backward passes until the smoothed accuracy is at `level`; NEVER."""
    curves = smoothed(accuracy.T.numpy())
    steps = [first_at(curve, level) for curve in curves]
    return np.array([NEVER if s == NEVER else float(passes[int(s), row]) for row, s in enumerate(steps)])


def look(search: Search) -> tuple[float, list[Found]]:
    """(level, every rule that was tried, the cheapest first)."""
    task = TASKS[search.task].build()
    tuned = {}
    for name, rule in search.tried.items():
        began = time.perf_counter()
        tuned[name] = train(task, rule, Runs(SEEDS, search.grid), search.steps(rule), optimizer=search.optimizer)
        print(f"  {name:<36} {time.perf_counter() - began:5.1f} s", file=sys.stderr, flush=True)
    shape = (len(search.grid), len(SEEDS))
    peaks = smoothed(tuned["GRPO"].accuracy.T.numpy()).max(axis=1).reshape(shape)
    level = LEVEL * float(np.median(peaks, axis=1).max())
    found = []
    for name, rule in search.tried.items():
        prices = passes_to(level, tuned[name].accuracy, tuned[name].passes).reshape(shape)
        order = [(prices[n].max(), np.median(prices[n]), prices[n].min()) for n in range(len(search.grid))]
        lr = search.grid[order.index(min(order))]
        curves = train(task, rule, Runs(TEST_SEEDS, [lr]), search.steps(rule), optimizer=search.optimizer)
        found.append(Found(name, lr, passes_to(level, curves.accuracy, curves.passes)))
    return level, sorted(found, key=lambda f: f.median)


def table(level: float, found: list[Found]) -> str:
    """Markdown."""
    grpo = next(f for f in found if f.rule == "GRPO").median
    lines = [f"Backward passes to accuracy {level:.3f}, median of ten seeds (quartiles):", ""]
    lines += ["| rule | its best lr | passes | times GRPO's | never |", "|---|---|---|---|---|"]
    for f in found:
        never = int(np.isinf(f.passes).sum())
        if np.isfinite(f.median):
            low, middle, high = quartiles(np.where(np.isinf(f.passes), 1e9, f.passes))
            upper = f"{high:.0f}" if high < 1e8 else "never"
            cells = (f"{middle:.0f} ({low:.0f} to {upper})", f"{middle / grpo:.2f}" if np.isfinite(grpo) else "")
        else:
            cells = ("never", "")
        lines.append(f"| {f.rule} | {f.lr:g} | {cells[0]} | {cells[1]} | {never or ''} |")
    return "\n".join(lines)


def put(page: str, name: str, text: str) -> str:
    """The page with the table between its marks replaced."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    made, n = re.subn(rf"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page, flags=re.S)
    if n != 1:
        raise ValueError(f"the page has {n} places for {name}, not one")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m gxpo_toy_tasks.hunt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("searches", nargs="*", metavar="TABLE", help=f"which (default: all): {', '.join(SEARCHES)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("RESULTS.md"),
        metavar="FILE",
        help="the page; one that is there keeps its other tables (default: %(default)s, in the folder you stand in)",
    )
    given = parser.parse_args(arguments)
    for name in given.searches:
        if name not in SEARCHES:
            parser.error(f"no table {name!r}; there are {', '.join(SEARCHES)}")
    try:
        page = (given.out if given.out.exists() else PAGE).read_text(encoding="utf-8")
        for name in SEARCHES:
            put(page, name, "")
        given.out.write_text(page, encoding="utf-8")  # now: a table takes minutes
    except (OSError, ValueError) as error:
        parser.error(f"--out {given.out}: {error}")
    torch.set_num_threads(1)
    for name in given.searches or SEARCHES:
        print(name, file=sys.stderr)
        text = table(*look(SEARCHES[name]))
        print(f"\n{name}\n{text}\n", flush=True)
        page = put(page, name, text)
        given.out.write_text(page, encoding="utf-8")
    print(f"written to {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
