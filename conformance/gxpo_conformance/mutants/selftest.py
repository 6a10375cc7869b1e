"""The suite is tested, too: implementations each wrong in one way go through it, and so do right ones.

Each must fail, by a clause that compares what it asked for or where it ended (a crash or a time-out proves nothing),
the clauses that are about its mistake among them, by at least LEAST_MARGIN tolerances; and no clause may be left that
rejects none of them.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gxpo_conformance.clauses.table import CHECKS, SPEC_VERSION, clauses
from gxpo_conformance.harness.budget import ALLOWED
from gxpo_conformance.mutants import LEAST_MARGIN, MUTANTS, correct
from gxpo_conformance.mutants.nearest import matrix
from gxpo_conformance.protocol import DTYPES
from gxpo_conformance.trial import FAIL, judge

Matrix = dict[str, Any]


def judged(who: str, dtype: str, only: Collection[str] = ()) -> dict[str, Any]:
    """One implementation in one dtype: the clauses that reject it and by how many tolerances, the awkward runs in which
    they do, and those it crashed in. `who`: a mutant's id, or the number of a right model. `only`: these clauses.

    A mutant's awkward runs are those of the clauses about it: all of them, for each mutant, would take half an hour."""
    port = MUTANTS[who].port() if who in MUTANTS else correct()[int(who)]
    verdict = judge(port, [dtype], only=only, awkward=MUTANTS[who].clauses if who in MUTANTS else None)
    kills: dict[str, float] = {}
    crashed: dict[str, str] = {}
    runs: dict[str, str] = {}
    for r in verdict.every():
        if r.verdict != FAIL or r.finding is None:  # a failure has a finding
            continue
        if r.finding.crash:
            crashed[r.clause.id] = r.message
        else:
            kills[r.clause.id] = math.inf if r.finding.budgets is None else r.finding.budgets / ALLOWED
            runs |= {r.clause.id: r.finding.run} if r.finding.run else {}
    passes = verdict.exit_status in (0, 3)
    return {"who": who, "dtype": dtype, "kills": kills, "runs": runs, "crashed": crashed, "passes": passes}


def judged_in_all(who: str) -> list[dict[str, Any]]:
    """One implementation in every dtype. A mutant by all clauses in float64; in the others by those alone that are
    about it or rejected it before (whole runs left out), for what float64 does not show, a coarser dtype shows hardly
    ever. A right model with something odd about it by the clauses that are about that, and by the random runs, which
    mix it with all."""
    if who not in MUTANTS:
        port = correct()[int(who)]
        only = {*port.about, "RND"} if port.about else ()
        return [judged(who, dtype, only) for dtype in port.dtypes]
    found = [judged(who, DTYPES[0])]
    for dtype in DTYPES[1:]:
        again = {c for c in found[-1]["kills"] if not c.startswith("TOY")}  # the dearest, and no other mistake's clause
        found.append(judged(who, dtype, {*MUTANTS[who].clauses, *again}))
    return found


def every_judgement(who: list[str]) -> Iterator[dict[str, Any]]:
    """In the order of `who`, on every core."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # passed on: Ctrl-C comes to this process alone
        try:
            results = pool.map(judged_in_all, who)
        finally:
            signal.signal(signal.SIGINT, heard)
        try:
            yield from itertools.chain.from_iterable(results)
        except BaseException:  # also where nobody asks for the next one any more
            threading.excepthook = lambda _: None  # the pool's own thread takes the end of its processes for a fault
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown()
            threading.excepthook = threading.__excepthook__
            raise


def selftest(only: Sequence[str] = ()) -> Matrix:
    """Runs it all, prints a line an implementation, and returns the matrix with what is wrong ("problems"). `only`:
    these mutants, while one is being written; of clauses that reject none and of right models nothing is said then."""
    began = time.perf_counter()
    right = [] if only else [str(n) for n in range(len(correct()))]
    chosen = {name: MUTANTS[name] for name in only or MUTANTS}
    problems: list[str] = []
    rows: dict[str, dict[str, Any]] = {}
    for found in every_judgement([*right, *chosen]):
        who, dtype = found["who"], found["dtype"]
        if who in right:
            name = correct()[int(who)].name
            print(f"{name} in {dtype}: {'passes' if found['passes'] else 'REJECTED'}", flush=True)
            if not found["passes"]:
                problems.append(f"a right implementation ({name}) is rejected in {dtype}: {', '.join(found['kills'])}")
            continue
        row = rows.setdefault(who, {"kills": {}, "margins": {}, "runs": {}})
        row["runs"] |= {dtype: found["runs"]} if found["runs"] else {}
        row["margins"][dtype] = found["kills"]
        row["kills"][dtype] = sorted(found["kills"], key=list(clauses()).index)
        problems += wrong_with(found)
        if dtype == DTYPES[-1]:
            print(told(who, row["kills"]), flush=True)
    made = {
        "spec": SPEC_VERSION,
        "mutants": [
            {
                **{"id": m.id, "does": m.does, "source": m.source, "style": m.style, "clauses": list(m.clauses)},
                "kills": rows[m.id]["kills"],
                **({"runs": rows[m.id]["runs"]} if rows[m.id]["runs"] else {}),
            }
            for m in chosen.values()
        ],
    }
    problems += [] if only else idle_clauses(rows)
    print_summary(made, problems, time.perf_counter() - began)
    return {**made, "problems": problems}


def wrong_with(found: dict[str, Any]) -> list[str]:
    """What is wrong with how the suite took one mutant in one dtype. bfloat16 shows the coarser mistakes only, so there
    it is enough that every clause has one (`idle_clauses`)."""
    mutant, dtype = MUTANTS[found["who"]], found["dtype"]
    due = [c for c in mutant.clauses if dtype in CHECKS[c].dtypes and dtype in mutant.shows and dtype != "bfloat16"]
    wrong = [
        f"{mutant.id} in {dtype}: {c} passes it"
        + (f" (it crashed: {found['crashed'][c]})" if c in found["crashed"] else "")
        for c in due
        if c not in found["kills"]
    ]
    return wrong + [
        f"{mutant.id} in {dtype}: {c} rejects it by {found['kills'][c]:.3g} tolerances only, of {LEAST_MARGIN:g}"
        for c in due
        if found["kills"].get(c, math.inf) < LEAST_MARGIN
    ]


def idle_clauses(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Clauses that in some dtype reject none of the mutants about them by enough."""
    wrong = []
    for c in clauses():
        about = [m.id for m in MUTANTS.values() if c in m.clauses]
        for dtype in CHECKS[c].dtypes:
            most = max((rows[m]["margins"][dtype].get(c, 0.0) for m in about), default=0.0)
            if most < LEAST_MARGIN:
                wrong.append(
                    f"{c} in {dtype} rejects no mutant that is about it by {LEAST_MARGIN:g}, only by {most:.3g}"
                )
    return wrong


def told(who: str, kills: dict[str, list[str]]) -> str:
    counts = " ".join(f"{len(kills[d]):>3}" for d in DTYPES)
    return f"{who:<34} {counts}  {', '.join(MUTANTS[who].clauses)}"


def sole_catchers(made: Matrix) -> dict[str, list[str]]:
    """Clause -> mutants that no other clause rejects, in any dtype."""
    found: dict[str, list[str]] = {}
    for m in made["mutants"]:
        kills = {c for by in m["kills"].values() for c in by}
        if len(kills) == 1:
            found.setdefault(kills.pop(), []).append(m["id"])
    return {c: found[c] for c in clauses() if c in found}


def print_summary(made: Matrix, problems: list[str], seconds: float) -> None:
    print()
    for clause, alone in sole_catchers(made).items():
        print(f"{clause} alone catches {', '.join(alone)}")
    if changed := [m["id"] for m in made["mutants"] if matrix().get(m["id"]) != m["kills"]]:
        print(f"not as published in mutants/matrix.json (--json FILE writes what was found): {', '.join(changed)}")
    for problem in problems:
        print(f"PROBLEM  {problem}")
    killed = sum(any(m["kills"].values()) for m in made["mutants"])
    styles = [m["style"] for m in made["mutants"]]
    print(
        f"{killed}/{len(styles)} wrong implementations rejected ({styles.count('functional')} functional, "
        f"{styles.count('in place')} in place), {len(problems)} problems, {seconds:.0f} s; end of selftest"
    )


def as_json(made: Matrix) -> str:
    """The matrix, a mutant a line."""
    head = {k: v for k, v in made.items() if k not in ("mutants", "problems")}
    lines = ",\n".join(json.dumps(m, separators=(",", ":")) for m in made["mutants"])
    return json.dumps(head)[:-1] + ', "mutants": [\n' + lines + "\n]}\n"
