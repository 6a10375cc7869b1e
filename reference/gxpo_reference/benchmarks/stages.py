"""What GXPO does besides backward passes and the optimizer's own steps, against the bytes it has to move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gxpo import GXPO
from gxpo_reference.benchmarks.contenders import SETTINGS, gxpo
from gxpo_reference.benchmarks.measure import (
    Aside,
    CopyFloor,
    OperationCounter,
    Progress,
    one_thread,
    summary,
    synchronizer,
    timed,
)
from gxpo_reference.benchmarks.models import Problem

STAGES = ("pass 1", "pass 2", "pass 3", "end")
TARGET = 1.5
TURN = 0.02  # seconds of stages that a turn has at least, by repeating it up to 20 times


def units(
    state: float, estimator: str = "gradient", rollback: bool = True, optimizer_state: str = "keep"
) -> list[float]:
    """Numbers read and written per parameter, at least, in each stage; `state` is the optimizer's, in the same unit.

    Least means that what can be one sweep over memory is one, but a norm must be known before it is used, and U may
    overwrite .grad. Pass 1: read g0 for its norm; read it again, write c0 g0 and a copy; copy theta0 and s0.
    Pass 2: read g1 for its norm; read it and g0, write c1 g1 and q; after U, read theta2, theta0 and q, write theta~.
    Pass 3: read g~ for its norm. Clipping is in it, as it is in a plain step. The displacements' estimators copy theta1
    in place of g0, after U, with |u0| in the same sweep (read two, write one), and need no q in memory: "displacement"
    reads three and writes theta~, "tensor" first reads three for its inner product and then two.
    """
    copy = 2 * state
    first = 1 + 2 + 2 + (copy if rollback or optimizer_state == "restore" else 0)
    restored = copy if optimizer_state == "restore" else 0
    if estimator == "gradient":
        return [first + 1, 1 + 4 + 4 + restored, 1, 0]
    return [first + 3, 1 + 2 + (4 if estimator == "displacement" else 6) + restored, 1, 0]


def stages(opt: GXPO, problem: Problem, aside: Aside) -> list[float]:
    """Seconds of one active step's stages. `aside` is on the base optimizer's step() and zero_grad()."""
    seconds = []
    opt.zero_grad()
    while True:
        problem.backward()
        before, more = aside.seconds, []
        whole = timed(lambda more=more: more.append(opt.lookahead()), aside.sync)
        seconds.append(whole - (aside.seconds - before))
        if not more[0]:
            break
    before = aside.seconds
    whole = timed(opt.step, aside.sync)  # the buffers are dropped here
    return [*seconds, whole - (aside.seconds - before)]


def watched(problem: Problem, device: str, settings: dict[str, Any]) -> tuple[GXPO, Aside]:
    """A GXPO whose base optimizer's own work is timed aside."""
    opt, aside = gxpo(problem, **settings), Aside(synchronizer(device))
    opt.base.step, opt.base.zero_grad = aside(opt.base.step), aside(opt.base.zero_grad)
    return opt, aside


def operations(problem: Problem, settings: dict[str, Any]) -> list[int]:
    """Operations in each stage, for any gradient: on a GPU and for small tensors, they are the price, not the bytes."""
    opt, counter = gxpo(problem, **settings), OperationCounter()

    def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            before = counter.count
            function(*args, **kwargs)
            counter.count = before

        return wrapped

    def counted(function: Callable[[], Any]) -> Any:
        counter.count = 0
        with counter:
            return function()

    opt.base.step, opt.base.zero_grad = uncounted(opt.base.step), uncounted(opt.base.zero_grad)
    counts: list[int] = []
    for _ in range(2):  # the first makes the optimizer's state
        counts, more = [], True
        while more:
            for p in problem.params:
                p.grad = p.detach() * 0.5
            more = counted(opt.lookahead)
            counts.append(counter.count)
        counted(opt.step)
        counts.append(counter.count)
    return counts


def measure(problem: Problem, device: str, rounds: int, names: tuple[str, ...] = ()) -> dict[str, Any]:
    settings = {name: given for name, given in SETTINGS.items() if not names or name in names}
    floor = CopyFloor(problem.nbytes, device)
    with one_thread():
        counts = {name: operations(problem, given) for name, given in settings.items()}
    running = {name: watched(problem, device, given) for name, given in settings.items()}
    quick = {}
    for name, (opt, aside) in running.items():
        stages(opt, problem, aside)  # makes the optimizer's state
        quick[name] = sum(stages(opt, problem, aside))
    item = problem.nbytes / problem.size
    state = sum(t.numel() * t.element_size() for s in opt.base.state.values() for t in s.values()) / problem.nbytes
    bytes_of = {
        name: [round(n * item * problem.size) for n in units(round(state), **settings[name])] for name in running
    }
    took: dict[str, list[list[float]]] = {name: [] for name in running}
    least: dict[str, list[float]] = {name: [] for name in running}
    for n in Progress("stages").rounds(rounds):
        for name, (opt, aside) in running.items():
            times = min(20, max(1, math.ceil(TURN / quick[name])))
            several = [stages(opt, problem, aside) for _ in range(times)]
            per_byte = floor.seconds_per_byte()
            if n:  # the first round warms up
                took[name].append([sum(stage) / times for stage in zip(*several, strict=True)])
                least[name].append(per_byte)
    problem.clear()

    def rows(name: str) -> dict[str, Any]:
        made = {}
        for at, stage in enumerate((*STAGES, "all")):
            part = slice(None) if stage == "all" else slice(at, at + 1)
            nbytes = sum(bytes_of[name][part])
            seconds = [sum(row[part]) for row in took[name]]
            floors = [nbytes * per_byte for per_byte in least[name]]
            made[stage] = {
                "bytes": nbytes,
                "operations": sum(counts[name][part]),
                "seconds": summary(seconds),
                "floor_seconds": summary(floors),
                "ratio": summary([s / f for s, f in zip(seconds, floors, strict=True)]) if nbytes else None,
            }
        return made

    return {"problem": str(problem), "parameters": problem.size, "settings": {name: rows(name) for name in running}}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("", "", "operations", "numbers moved", "ms", "floor, ms", "ratio", "quartiles", "target")]
    for name, made in result["settings"].items():
        for stage, row in made.items():
            each = row["bytes"] / made["pass 3"]["bytes"]
            low, high = row["ratio"]["quartiles"] if row["ratio"] else (0.0, 0.0)
            rows.append(
                (
                    name if stage == STAGES[0] else "",
                    stage,
                    str(row["operations"]),
                    f"{each:.0f} a parameter" if each else "",
                    f"{1e3 * row['seconds']['median']:.2f}",
                    f"{1e3 * row['floor_seconds']['median']:.2f}" if each else "",
                    f"{row['ratio']['median']:.2f}" if each else "",
                    f"{low:.2f} to {high:.2f}" if each else "",
                    f"{TARGET}" if stage == "all" else "",
                )
            )
    return rows
