"""Puts awkward runs to a port, and shrinks the one that fails."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gxpo_conformance.harness.findings import CaseError, Failure
from gxpo_conformance.harness.harness import Harness, Run
from gxpo_conformance.protocol import declares
from gxpo_conformance.runs.build import Event, Plan, build, fit
from gxpo_conformance.runs.focus import ACCIDENTS, FOCUS, random_run
from gxpo_conformance.runs.levels import SIMPLEST, Levels, fitted

RANDOM_RUNS = {"RND-01": 60, "RND-02": 140}  # of a verdict
SEED = 0
SHARE = 6  # of the awkward runs, one in so many is played in the further dtypes of a verdict, too
MOST_TRIES = 60  # to make a failing run smaller


@dataclass(frozen=True)
class Awkward:
    """One run: all that makes it, by name."""

    name: str
    levels: Levels
    events: tuple[Event, ...]
    judge: str
    untidy: bool
    neighbour: str = ""  # the name of another run, whose session makes a step before each of this one's

    def plan(self, dtype: str) -> Plan:
        return build(self.levels, self.events, self.name, dtype)


def possible(events: tuple[Event, ...], harness: Harness) -> tuple[Event, ...]:
    """Without the accidents that the port does not declare, nor the run can make."""

    def can(odd: str) -> bool:
        need = ACCIDENTS.get(odd)
        return (not need or declares(harness.capabilities, need)) and (
            odd != "interrupt" or declares(harness.capabilities, "in process")
        )

    return tuple(e if can(e.odd) else Event(e.key, e.target) for e in events)


def has_runs(clause: str) -> bool:
    return clause in RANDOM_RUNS or clause in FOCUS


def runs_of(clause: str, harness: Harness, seed: int = SEED) -> Iterator[Awkward]:
    """The awkward runs of a clause, as far as the port declares what is in them."""
    if clause in RANDOM_RUNS:
        names = [f"{clause}#{seed}/{n}" for n in range(RANDOM_RUNS[clause])]
    else:
        names = [name for name, _ in planned(clause)]
    for name in names if harness.foremost else names[::SHARE]:
        yield named(name, harness)


@functools.cache
def planned(clause: str) -> tuple[tuple[str, Awkward], ...]:
    """The runs that the covering arrays of a clause give, by name, as a port that has everything plays them."""
    made: list[tuple[str, Awkward]] = []
    for key, focus in FOCUS.items():
        if key.partition("/")[0] == clause:
            for levels, events in focus.plan(key):
                name = f"{clause}#{len(made) + 1}"
                made.append((name, Awkward(name, levels, events, focus.judge, focus.untidy)))
    return tuple(made)


def named(name: str, harness: Harness) -> Awkward:
    """The run of that name, as the port can play it: NUM-03#4, RND-02#0/117. ValueError where there is none."""
    found = re.fullmatch(r"([A-Z]{3}-\d\d)#(?:(\d+)/)?(\d+)", name)
    if found and found[1] in RANDOM_RUNS and found[2]:
        whole = Awkward(name, *random_run(name, options=found[1] == "RND-02"))
        if int(found[3]) % 5 == 3:
            whole = replace(whole, neighbour=f"{found[1]}#{found[2]}/{int(found[3]) - 1}")
    elif found and found[1] in FOCUS and not found[2]:
        rows = dict(planned(found[1]))
        if name not in rows:
            raise ValueError(f"{found[1]} has no awkward run {name}; it has {found[1]}#1 to {found[1]}#{len(rows)}")
        whole = rows[name]
    else:
        raise ValueError(f"no awkward run {name!r}; they are called NUM-03#4, or RND-02#0/117 for seed 0")
    return replace(
        whole,
        levels=fitted(whole.levels, harness.capabilities, harness.dtype),
        events=possible(whole.events, harness),
        untidy=whole.untidy and declares(harness.capabilities, "in process"),
    )


def play(harness: Harness, awkward: Awkward) -> Run:
    """Failure where the port leaves the oracle; CaseError where rounding turned out to decide."""
    plan = awkward.plan(harness.dtype)
    run = harness.begin(plan.start, plan.config)
    run.talk.untidy = awkward.untidy
    aside = beside(harness, awkward)
    # In every other run with a resume in it, what is saved is also saved after each step, and thrown away.
    saves_often = any(e.odd == "resume" for e in awkward.events) and awkward.name[-1] in "02468"
    run.fit = lambda trace: fit(trace, run.config, harness.dtype)
    for step in plan.steps:
        next(aside)
        event = step.event
        if event.odd in ("raise", "interrupt"):
            run.raising(step.script, event.at, step.statistic, step.raises)
            continue
        if event.odd == "resume":
            run.talk.resume(step.script, step.statistic, step.losses)
        run.step(step.script, step.losses, awkward.judge, step.statistic)
        if saves_often:
            harness.call("save()", lambda: run.talk.session.save())
    return run


def beside(harness: Harness, awkward: Awkward) -> Iterator[None]:
    """Makes the neighbour's steps, one at a time: a session is untouched by another (INV-09)."""
    if awkward.neighbour:
        plan = named(awkward.neighbour, harness).plan(harness.dtype)
        talk, harness.latest = harness.talk(plan.start, plan.config), harness.latest
        harness.talks.pop()
        for step in plan.steps:
            latest = harness.latest
            if step.event.odd not in ("raise", "interrupt", "resume"):
                talk.step(step.script, step.losses, step.statistic)
            harness.latest = latest
            yield
    while True:
        yield


def attempt(harness: Harness, awkward: Awkward) -> Failure | None:
    try:
        play(harness, awkward)
    except Failure as failure:
        return failure
    except CaseError:
        pass
    return None


def check(harness: Harness, clause: str, seed: int = SEED) -> None:
    """Failure, of the smallest run that was found, where a port fails one of the clause's awkward runs."""
    for awkward in runs_of(clause, harness, seed):
        failure = attempt(harness, awkward)
        if failure is not None:
            raise shrunk(harness, awkward, failure)


@dataclass
class Shrinker:
    """Makes a failing run smaller, one thing at a time, as long as it goes on failing."""

    harness: Harness
    awkward: Awkward
    failure: Failure
    tries: int = MOST_TRIES

    def holds(self, **smaller: Any) -> bool:
        """Whether the run still fails with this changed; then it is changed."""
        if self.tries <= 0:
            return False
        self.tries -= 1
        candidate = replace(self.awkward, **smaller)
        found = attempt(self.harness, candidate)
        if found is None or found.finding.crash != self.failure.finding.crash:
            return False
        self.awkward, self.failure = candidate, found
        return True

    def drop_steps(self) -> None:
        n = len(self.awkward.events) - 2
        while n >= 0:
            events = self.awkward.events
            self.holds(events=events[:n] + events[n + 1 :])
            n -= 1

    def simplify(self) -> None:
        harness, levels = self.harness, self.awkward.levels
        for factor, simplest in [*SIMPLEST.items(), ("sizes", "one")]:  # nothing is simpler than one tensor
            simpler = fitted({**levels, factor: simplest}, harness.capabilities, harness.dtype)
            if simpler != levels and self.holds(levels=simpler):
                levels = simpler


def shrunk(harness: Harness, awkward: Awkward, failure: Failure) -> Failure:
    """The failure of a smaller run of the same kind: fewer steps, simpler levels. The harness's latest talk is it."""
    whole = len(awkward.plan(harness.dtype).steps)
    shrinker = Shrinker(harness, awkward, failure)
    if not failure.finding.timed_out:
        last = (failure.finding.step or 0) + 1
        kept = tuple(step.event for step in awkward.plan(harness.dtype).steps[:last])
        if shrinker.holds(events=kept):
            shrinker.holds(neighbour="")
            shrinker.drop_steps()
            shrinker.simplify()
        attempt(harness, shrinker.awkward)  # so that the latest talk is the one that is told of
    small = shrinker.awkward
    steps = f"{len(small.plan(harness.dtype).steps)} of its {whole} steps"
    text = f"{shrinker.failure} (awkward run {awkward.name}, {steps}: {told(small)})"
    return Failure(text, **{**shrinker.failure.where, "run": awkward.name})


def told(awkward: Awkward) -> str:
    """What is not simple about it."""
    parts = [
        f"{factor} {level}" if not isinstance(level, bool) else factor
        for factor, level in awkward.levels.items()
        if level != SIMPLEST[factor]
    ]
    return ", ".join(parts) or "the simplest settings"
