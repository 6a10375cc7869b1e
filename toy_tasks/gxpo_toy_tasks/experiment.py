"""A comparison of update rules on one task: what is trained, in which order, and what is kept of it.

Three phases, a cell each rule: "same", every rule at the same learning rates; "tune", every rule over a grid of rates
with seeds of its own; "best", every rule at the rate that its own tuning found, with the first phase's seeds. A cell is
kept in results.json the moment it is done, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gxpo
from gxpo_toy_tasks.engine import OPTIMIZERS, Curves, Rule, Runs, train
from gxpo_toy_tasks.measures import mean_accuracy
from gxpo_toy_tasks.rules import USUAL, rules
from gxpo_toy_tasks.tasks.table import TASKS, Setting

Cell = dict[str, Any]
TUNE_SEEDS = (1000, 1001, 1002)  # never a test seed


@dataclass(frozen=True)
class Plan:
    """What to compare. lr: rates for every rule alike, in place of the task's own and of tuning."""

    task: str = "contextual"
    rules: tuple[str, ...] = USUAL
    lr: tuple[float, ...] = ()
    seeds: int = 5
    steps: int = 0  # 0: the task's own number
    horizon: int = 5
    alpha: float = 0.8
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    device: str = "cpu"
    quick: bool = False

    def __post_init__(self) -> None:
        known = rules(max(self.horizon, 2), self.alpha)
        for what, ok, bound in (
            ("task", self.task in TASKS, f"one of {', '.join(TASKS)}"),
            ("rules", bool(self.rules) and set(self.rules) <= set(known), f"out of {', '.join(known)}"),
            ("lr", all(np.isfinite(lr) and lr > 0 for lr in self.lr), "numbers > 0"),
            ("seeds", isinstance(self.seeds, int) and self.seeds >= 1, "an int >= 1"),
            ("steps", isinstance(self.steps, int) and self.steps >= 0, "an int >= 0 (0: the task's own)"),
            ("horizon", isinstance(self.horizon, int) and self.horizon >= 2, "an int >= 2"),
            ("alpha", np.isfinite(self.alpha) and self.alpha >= 0, "a number >= 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("max_grad_norm", self.max_grad_norm > 0, "a number > 0"),
            ("device", self.device in ("cpu", "cuda"), "cpu or cuda"),
        ):
            if not ok:
                raise ValueError(f"{what} must be {bound}, got {getattr(self, what)!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu here, got 'cuda': this machine has no CUDA device")

    @property
    def setting(self) -> Setting:
        return TASKS[self.task]

    @property
    def length(self) -> int:
        steps = self.steps or self.setting.steps
        return min(steps, 20) if self.quick else steps

    @property
    def test_seeds(self) -> list[int]:
        return list(range(min(self.seeds, 2) if self.quick else self.seeds))

    @property
    def compared(self) -> dict[str, Rule]:
        """The rules, plain GRPO among them whatever was asked for: all is measured against it."""
        known = rules(self.horizon, self.alpha)
        return {name: known[name] for name in dict.fromkeys(("grpo", *self.rules))}

    @property
    def factor(self) -> float:
        """Rates of SGD are other numbers than AdamW's; sixteen times suits these tasks, 1.6 times momentum."""
        return {"adamw": 1.0, "sgd": 16.0, "momentum": 1.6}[self.optimizer]

    @property
    def same_rates(self) -> list[float]:
        return list(self.lr) or [self.setting.rate * self.factor]

    @property
    def grid(self) -> list[float]:
        """Rates that are tuned over; none where rates were given, or where it has to be quick."""
        return [] if self.lr or self.quick else [lr * self.factor for lr in self.setting.grid]


class Comparison:
    """A plan in a folder."""

    def __init__(self, plan: Plan, folder: Path | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.task = plan.setting.build()
        self.cells: dict[str, Cell] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.resume(folder / "results.json")

    def resume(self, path: Path) -> None:
        """Take in what an interrupted run of the same plan left. ValueError where it is another plan's folder."""
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            mine = as_json(self.plan)
            if there.get("plan") != mine:
                old = there.get("plan", {})
                other = [k for k in mine if old.get(k) != mine[k]] if isinstance(old, dict) else []
                raise ValueError(
                    f"{path.parent} holds results of another plan ({', '.join(other)} differ): "
                    "choose another --out, or delete that folder"
                )
            self.cells = there["cells"]

    def jobs(self) -> list[tuple[str, str]]:
        """(phase, rule) of every cell, in order."""
        phases = ["same", "tune", "best"] if self.plan.grid else ["same"]
        return [(phase, name) for phase in phases for name in self.plan.compared]

    def runs(self, phase: str, name: str) -> Runs:
        if phase == "tune":
            return Runs(TUNE_SEEDS, self.plan.grid)
        return Runs(self.plan.test_seeds, [self.best_rate(name)] if phase == "best" else self.plan.same_rates)

    def best_rate(self, name: str) -> float:
        """The rate whose median training, over the tuning seeds, had the highest accuracy on average."""
        cell = self.cells[f"tune/{name}"]
        accuracy = np.array(cell["accuracy"]).reshape(len(cell["lrs"]), len(cell["seeds"]), -1)
        return cell["lrs"][int(np.argmax(np.median(mean_accuracy(accuracy), axis=1)))]

    def go(
        self,
        on_step: Callable[[int], None] = lambda steps: None,
        on_phase: Callable[[str], None] = lambda phase: None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Train every cell that is not there yet; the results, as they are in results.json.

        on_step is told how many steps were done since it was called last, on_phase which phase begins; meanwhile is
        called while workers are at it, for what the caller will need afterwards.
        """
        for phase in dict.fromkeys(phase for phase, _ in self.jobs()):
            names = [name for at, name in self.jobs() if at == phase]
            missing = [name for name in names if f"{phase}/{name}" not in self.cells]
            on_step(self.plan.length * (len(names) - len(missing)))
            on_phase(phase)
            for name, cell in self.trained(missing, [self.runs(phase, name) for name in missing], on_step, meanwhile):
                self.cells[f"{phase}/{name}"] = cell
                self.save()
        order = [f"{phase}/{name}" for phase, name in self.jobs()]
        self.cells = {key: self.cells[key] for key in order}  # whichever was done first
        self.save()
        return self.results()

    def trained(
        self, names: list[str], runs: list[Runs], on_step: Callable[[int], None], meanwhile: Callable[[], object]
    ) -> Iterator[tuple[str, Cell]]:
        """(rule, its cell) as they are done, several at a time where the machine allows it."""
        workers = min(len(names), workers_for(self.plan.device))
        if workers < 2:
            for name, rows in zip(names, runs, strict=True):
                yield name, self.cell(name, rows, lambda: on_step(1))
            return
        fork = multiprocessing.get_context("fork")  # a worker has torch loaded and the task built
        done, stop, told = fork.Value("L", 0), fork.Event(), 0
        with (
            interrupts_later() as interrupted,
            ProcessPoolExecutor(workers, fork, _inherit, (self, done, stop)) as pool,
        ):
            try:
                cells = {pool.submit(_cell, name, rows): name for name, rows in zip(names, runs, strict=True)}
                meanwhile()
                while cells and not interrupted:
                    for ready in wait(cells, timeout=0.1, return_when=FIRST_COMPLETED).done:
                        yield cells.pop(ready), ready.result()
                    before, told = told, done.value
                    on_step(told - before)
            finally:
                stop.set()

    def cell(self, name: str, runs: Runs, on_step: Callable[[], None]) -> Cell:
        """Train one rule."""
        curves = train(
            self.task,
            self.plan.compared[name],
            runs,
            self.plan.length,
            lambda step: on_step(),
            optimizer=self.plan.optimizer,
            max_grad_norm=self.plan.max_grad_norm,
            device=self.plan.device,
        )
        return as_cell(curves, runs)

    def results(self) -> dict[str, Any]:
        return {
            "kind": "learning",
            "plan": as_json(self.plan),
            "versions": versions(),
            "about": self.plan.setting.about,
            "cells": self.cells,
        }

    def save(self) -> None:
        if self.folder is not None:
            write(self.folder / "results.json", json.dumps(self.results(), allow_nan=False) + "\n")


# ---- In a worker ----------------------------------------------------------------------------------------------------

_inherited: tuple[Comparison, Any, Any]  # what _inherit was given, through the fork and so without a copy


def workers_for(device: str) -> int:
    """Processes to train in: two, on a CPU that has the cores; more would leave a classroom's laptop none.

    One where processes cannot be forked, or where CUDA is about: autograd's threads do not survive a fork.
    """
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return 2 if device == "cpu" and forks and (os.cpu_count() or 1) > 1 and not torch.cuda.is_available() else 1


@contextlib.contextmanager
def interrupts_later() -> Iterator[list[int]]:
    """Ctrl-C, as a list that it makes longer; KeyboardInterrupt comes at the block's end. Pressed twice it would
    otherwise interrupt the pool's own ending, and the pool then waits for its workers for ever."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def _inherit(*what: Any) -> None:
    global _inherited
    _inherited = what
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which says so by `stop`


def _cell(name: str, runs: Runs) -> Cell:
    comparison, done, stop = _inherited

    def on_step() -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with done.get_lock():
            done.value += 1

    return comparison.cell(name, runs, on_step)


# ---- As JSON --------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """All of it or nothing: an interruption leaves the file as it was."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def as_json(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def versions() -> dict[str, str]:
    return {
        "gxpo": gxpo.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def as_cell(curves: Curves, runs: Runs) -> Cell:
    """Curves as JSON, a list a run. What is not there (q of a plain step) is null."""
    fell_back = [[n for n, now in enumerate(row) if not now][:1] for row in curves.active.T.tolist()]
    return {
        "seeds": list(runs.seeds),
        "lrs": list(runs.lrs),
        "accuracy": rounded(curves.accuracy.T),
        "passes": curves.passes.T.tolist(),
        "q": rounded(curves.q.transpose(0, 1)),
        "z": rounded(curves.z.T),
        "multiplier": rounded(curves.multiplier.T),
        "first_single": [steps[0] if steps else None for steps in fell_back],
        "seconds": {key: round(value, 4) for key, value in curves.seconds.items()},
    }


def rounded(values: torch.Tensor) -> Any:
    """Six digits, as nested lists; None for what is not finite."""

    def one(v: Any) -> Any:
        if isinstance(v, list):
            return [one(w) for w in v]
        return float(f"{v:.6g}") if np.isfinite(v) else None

    return one(values.tolist())
