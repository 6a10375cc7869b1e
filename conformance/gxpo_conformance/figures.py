"""Figures about the suite itself.

python -m gxpo_conformance.figures budgets   how much of its rounding budget a right implementation needs
python -m gxpo_conformance.figures speed     how long whole commands take, wall-clock, imports included
python -m gxpo_conformance.figures names     how often a failing port is given the name of the right known mistake

budgets: random settings, parameters and scripted gradients; the port (the bundled gxpo.py, or --impl) beside the
oracle. A column a dtype; each cell is the 50th and 99th percentile and the largest number of budgets that any point of
a case took. The suite allows ALLOWED of them.

names: each of the suite's mutants as a port, in float64 and float32, as it is, and with its own entry taken from
the known mistakes: then it stands for a mistake that nobody knows, and any name is wrong. mutants/matrix.json has to be
of this state (selftest --json).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.harness.harness import Harness, Run
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.mutants.nearest import Nearest
from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import CORE, DTYPES, AdapterError, check_capabilities, config
from gxpo_conformance.trial import judge

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01},
}
STEPS = 3
COORDINATES = 64


def random_run(harness: Harness, rng: np.random.Generator, settings: dict[str, Any]) -> Run:
    """A few random steps, judged at every point; Failure where one leaves its budget."""
    made = config(
        horizon=int(rng.choice([2, 3, 4, 5, 10])),
        alpha=float(rng.choice([0.3, 0.5, 0.8, 1.0])),
        max_grad_norm=float(rng.choice([0.5, 4.0])) if rng.random() < 0.5 else None,
        optimizer_state=str(rng.choice(harness.capabilities["optimizer_state"])),
        **settings,
    )
    run = harness.begin({"w": rng.normal(size=COORDINATES) * 10.0 ** rng.uniform(-3, 0)}, made)
    size = 10.0 ** rng.uniform(-2, 1)
    for _ in range(STEPS):
        g0 = rng.normal(size=COORDINATES) * size
        g0 = np.where(np.abs(g0) < 2e-3 * size, 0.0, g0)  # none near the activity bound
        r = rng.uniform(-0.9, 2.0, COORDINATES) if rng.random() < 0.5 else 1 + rng.normal(size=COORDINATES) * 0.05
        run.step([{"w": g0}, {"w": g0 * r}, {"w": rng.normal(size=COORDINATES) * size}])
    return run


def budgets(given: argparse.Namespace) -> None:
    port = load(given.impl)
    declared = check_capabilities(port.capabilities())
    print(f"{port.name}: budgets needed (median / 99 % / most), {ALLOWED:g} allowed; seed {given.seed}")
    print(f"{'':<26}" + "".join(f"{d:<22}" for d in DTYPES if d in declared["dtypes"]))
    for estimator in declared["estimators"]:
        for name, optimizer in OPTIMIZERS.items():
            cells = []
            for dtype in (d for d in DTYPES if d in declared["dtypes"]):
                rng = np.random.default_rng([given.seed, len(cells)])
                harness = Harness(port, declared, dtype, "cpu")
                settings = {"estimator": estimator, "optimizer": optimizer}
                used = [random_run(harness, rng, settings).used for _ in range(given.cases)]
                cells.append("{:.2f} / {:.2f} / {:.2f}".format(*np.percentile(used, [50, 99, 100])))
            print(f"{estimator + ', ' + name:<26}" + "".join(f"{c:<22}" for c in cells))


class CorePort:
    """The bundled gxpo.py, declaring the core alone."""

    def __init__(self) -> None:
        self.whole = load()
        self.name, self.start = self.whole.name + ", core", self.whole.start

    def capabilities(self) -> dict[str, Any]:
        core = {key: [enough[0]] for key, enough in CORE.items()}
        return {**core, "dtypes": ["float64"], "devices": ["cpu"], "optimizer_state": ["keep"]}


COMMANDS = {  # what is timed -> (arguments, the bound that is aimed at, in seconds)
    "core, in process": (["--impl", "gxpo_conformance.figures:CorePort"], 5),
    "everything declared, in process": ([], 30),
    "everything declared, over stdio": (
        ["--exec", f"{sys.executable} -m gxpo_conformance.process.serve gxpo_conformance.adapters.torch:Port"],
        60,
    ),
    "selftest": (["selftest"], 120),
}


def speed(given: argparse.Namespace) -> None:
    load()  # AdapterError before anything is timed
    print(f"{os.cpu_count()} cores; seconds of each of {given.runs} runs, imports included")
    for what, (arguments, bound) in COMMANDS.items():
        times = []
        for _ in range(given.runs):
            began = time.perf_counter()
            command = [sys.executable, "-m", "gxpo_conformance.cli", *arguments]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            times.append(time.perf_counter() - began)
            if done.returncode:
                sys.exit(f"{what}: exit status {done.returncode}")
        print(f"{what:<34}" + "  ".join(f"{t:5.1f}" for t in times) + f"   (aim: {bound})", flush=True)


RIGHT, AMONG, UNKNOWN, LIKELY, CERTAIN = NAMED = (
    "right",
    "among several",
    "does not know",
    "wrong, as likely",
    "wrong, as certain",
)


def named(who: str) -> list[tuple[str, str]]:
    """How a mutant is named: as it is, and without its own entry; each as (one of NAMED, the words)."""
    verdict = judge(MUTANTS[who].port(), ["float64", "float32"])
    found = []
    for without in ([], [who]):
        guess = next(iter(Nearest(verdict, without).guesses), None)
        if guess is None:
            kind = UNKNOWN
        elif MUTANTS[who] in guess.mutants:
            kind = RIGHT if len(guess.mutants) == 1 else AMONG
        else:
            kind = CERTAIN if guess.certain else LIKELY
        found.append((kind, guess.words if guess else ""))
    return found


def names(given: argparse.Namespace) -> None:
    began = time.perf_counter()
    chosen = given.mutants or list(MUTANTS)
    counts: list[Counter[str]] = [Counter(), Counter()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for who, found in zip(chosen, pool.map(named, chosen), strict=True):
            for of, (kind, words) in zip(counts, found, strict=True):
                of[kind] += 1
                if kind in (LIKELY, CERTAIN):
                    print(f"{who}: {kind}: {words}", flush=True)
    print(f"{len(chosen)} mistakes, {time.perf_counter() - began:.0f} s")
    for about, of in zip(("known", "unknown"), counts, strict=True):
        fine = sum(of[kind] for kind in (RIGHT, AMONG, UNKNOWN)) / len(chosen)
        told = ", ".join(f"{kind} {of[kind]}" for kind in NAMED if of[kind])
        print(f"as mistakes that are {about}: {told}; right or silent in {100 * fine:.1f} of 100")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m gxpo_conformance.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="budgets | speed | names")
    budget = commands.add_parser("budgets", help="rounding budgets that a right implementation needs")
    budget.add_argument("--impl", help="the port's adapter (default: the bundled gxpo.py)")
    budget.add_argument("--cases", type=int, default=200, help="random cases a cell (default: %(default)s)")
    budget.add_argument("--seed", type=int, default=0, help="of the random cases (default: %(default)s)")
    budget.set_defaults(function=budgets)
    timing = commands.add_parser("speed", help="wall-clock of whole commands")
    timing.add_argument("--runs", type=int, default=2, help="of each command (default: %(default)s)")
    timing.set_defaults(function=speed)
    naming = commands.add_parser("names", help="how often a known mistake is named rightly")
    naming.add_argument("mutants", nargs="*", metavar="MUTANT", help="only these (default: all)")
    naming.set_defaults(function=names)
    given = parser.parse_args(arguments)
    try:
        given.function(given)
    except AdapterError as error:
        sys.exit(f"gxpo_conformance.figures: {error}")


if __name__ == "__main__":
    main()
