"""The command gxpo-toys."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    for needed in ("torch", "matplotlib"):  # the second is loaded when there is something to draw
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(name=needed)
except ImportError as missing:
    sys.exit(f'gxpo-toys needs {missing.name}: pip install "gxpo[toys]" (from a checkout: pip install -e ".[toys]")')

import torch

from gxpo_toy_tasks.engine import OPTIMIZERS
from gxpo_toy_tasks.experiment import Comparison, Plan
from gxpo_toy_tasks.rules import ABOUT
from gxpo_toy_tasks.tables import show
from gxpo_toy_tasks.tasks.table import TASKS

QUADRATICS = "quadratics"
PHASES = {"same": "one rate for all", "tune": "tuning", "best": "own best rates"}


class BadOption(Exception):
    """One line for the user."""


class Bar:
    """A progress bar, drawn ten times a second at most, without a thread: workers are forked beside it."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.drawn = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self.task, self.due = self.drawn.add_task(what, total=total), 0.0

    def __enter__(self) -> Bar:
        self.drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.drawn.stop()

    def on(self, steps: int = 1, what: str | None = None) -> None:
        self.drawn.update(self.task, advance=steps, description=what)
        if time.monotonic() >= self.due:
            self.drawn.refresh()
            self.due = time.monotonic() + 0.1


def words(text: str) -> tuple[str, ...]:
    """By comma."""
    return tuple(w.strip() for w in text.split(",") if w.strip())


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(w) for w in words(text))


def plan_of(given: argparse.Namespace) -> Plan:
    """The file's settings with the flags on top."""
    settings: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(Plan)} - {"task"}
    if given.config:
        try:
            settings = tomllib.loads(Path(given.config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadOption(f"--config {given.config}: {error}") from error
        if unknown := settings.keys() - known:
            raise BadOption(
                f"--config {given.config}: no setting {min(unknown)!r}; there are {', '.join(sorted(known))}"
            )
    settings |= {k: v for k, v in vars(given).items() if k in known and v is not None}
    if settings.get("rules") in (("all",), ["all"], "all"):
        settings["rules"] = tuple(ABOUT)
    for key in ("rules", "lr"):
        if key in settings:
            value = settings[key]
            settings[key] = tuple(value) if isinstance(value, list | tuple) else (value,)
    try:
        return Plan(task=given.task, **settings)
    except (TypeError, ValueError) as error:
        raise BadOption(str(error)) from error


# ---- The commands ---------------------------------------------------------------------------------------------------


def list_tasks(given: argparse.Namespace, console: Console) -> None:
    console.print("Tasks, for gxpo-toys run TASK:")
    console.print(f"  {QUADRATICS:<20} prediction error and cost on diagonal, rotated, ill-conditioned and noisy ones")
    for name, setting in TASKS.items():
        console.print(f"  {name:<20} {setting.about}; lr {setting.rate:g}, {setting.steps} steps", highlight=False)
    console.print("\nRules, for --rules a,b (or all):")
    for name, about in ABOUT.items():
        console.print(f"  {name:<20} {about}", highlight=False)


def run(given: argparse.Namespace, console: Console) -> None:
    folder = Path(given.out or f"gxpo-toys-{given.task}")
    if given.task == QUADRATICS:
        return run_quadratics(given, folder, console)
    plan = plan_of(given)
    try:
        comparison = Comparison(plan, folder)
    except ValueError as error:
        raise BadOption(str(error)) from error
    with Bar(console, "", len(comparison.jobs()) * plan.length) as bar:
        results = comparison.go(bar.on, lambda phase: bar.on(0, PHASES[phase]), drawing)
    show(results, console)
    finish(results, folder, console)


def run_quadratics(given: argparse.Namespace, folder: Path, console: Console) -> None:
    from gxpo_toy_tasks import quadratic_study

    understood = {"command", "function", "task", "out", "quick"}
    if ignored := [f"--{name}" for name, value in vars(given).items() if name not in understood and value is not None]:
        raise BadOption(f"{QUADRATICS} takes --out and --quick, got {', '.join(ignored)}: its plan is fixed")
    quick = bool(given.quick)
    folder.mkdir(parents=True, exist_ok=True)
    with Bar(console, QUADRATICS, len(quadratic_study.parts(quick))) as bar:
        try:
            results = quadratic_study.study(quick, bar.on, folder)
        except ValueError as error:
            raise BadOption(str(error)) from error
    console.print(quadratic_study.tables(results), highlight=False)
    finish(results, folder, console)


def drawing() -> Callable[[dict[str, Any], Path], list[Path]]:
    """matplotlib is half a second to load: not before it is needed, or while there is nothing else to do."""
    from gxpo_toy_tasks.plots.draw import draw

    return draw


def finish(results: dict[str, Any], folder: Path, console: Console) -> None:
    with console.status("drawing"):
        drawn = drawing()(results, folder)
    pictures = ", ".join(path.name for path in drawn if path.suffix == ".png")
    console.print(f"\n{folder / 'results.json'} has every number; pictures beside it: {pictures}", highlight=False)


def plot(given: argparse.Namespace, console: Console) -> None:
    path = Path(given.folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption(f"{path}: {error}") from error
    if not isinstance(results, dict) or "kind" not in results:
        raise BadOption(f"{path} is not what gxpo-toys run writes")
    if results["kind"] == QUADRATICS:
        from gxpo_toy_tasks.quadratic_study import complete

        if not complete(results):
            raise BadOption(f"{path} is unfinished: gxpo-toys run {QUADRATICS} --out {given.folder} goes on with it")
    finish(results, Path(given.folder), console)


def make_animation(given: argparse.Namespace, console: Console) -> None:
    from gxpo_toy_tasks.plots.quadratics import animate

    path = Path(given.out or "quadratics.gif")
    if path.suffix.lower() != ".gif":
        raise BadOption(f"--out must be a file that ends in .gif, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with console.status("drawing"):
        animate(path)
    console.print(f"{path}", highlight=False)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gxpo-toys",
        description="Experiments with GXPO and the rules that it is compared with, in seconds on a CPU.",
    )
    commands = made.add_subparsers(required=True, metavar="list | run | plot | animate", dest="command")
    commands.add_parser("list", help="the tasks and the rules").set_defaults(function=list_tasks)

    one = commands.add_parser(
        "run",
        help="compare rules on a task",
        description="Compare update rules on a task: a table, a verdict in words, results.json and pictures. Without "
        "--lr every rule is compared at one conservative rate and at its own best one, tuned with other seeds. "
        "Interrupted, the same command goes on where it was.",
    )
    one.add_argument("task", choices=(QUADRATICS, *TASKS), metavar="TASK", help=f"{QUADRATICS}, {', '.join(TASKS)}")
    one.add_argument("--out", metavar="DIR", help="where results go (default: gxpo-toys-TASK)")
    one.add_argument("--rules", type=words, metavar="A,B", help="what to compare, by comma, or all (see list)")
    one.add_argument("--lr", type=numbers, metavar="X,Y", help="rates for every rule alike, in place of tuning")
    one.add_argument("--seeds", type=int, help="how many (default: 5)")
    one.add_argument("--steps", type=int, help="outer steps (default: the task's)")
    one.add_argument("--horizon", type=int, help="K (default: 5)")
    one.add_argument("--alpha", type=float, help="part of the way (default: 0.8)")
    one.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="of every rule (default: adamw)")
    one.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu")
    one.add_argument(
        "--quick", action="store_true", default=None, help="a few seconds: two seeds, 20 steps, no tuning, no SVG"
    )
    one.add_argument("--config", metavar="FILE", help="TOML with any of these settings; flags go on top")
    one.set_defaults(function=run)

    two = commands.add_parser("plot", help="draw the pictures of a folder's results.json again")
    two.add_argument("folder", metavar="DIR")
    two.set_defaults(function=plot)

    three = commands.add_parser("animate", help="one step on a 2-D quadratic as a GIF")
    three.add_argument("what", choices=(QUADRATICS,), metavar=QUADRATICS)
    three.add_argument("--out", metavar="FILE", help="default: quadratics.gif")
    three.set_defaults(function=make_animation)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives
    try:
        given.function(given, console)
    except (BadOption, OSError) as error:  # a full disk, a file where a folder should be
        print(f"gxpo-toys: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngxpo-toys: stopped; what was done is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
