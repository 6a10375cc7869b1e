"""Awkward runs: the same whenever and wherever they are made, fit to be judged by, and of what they promise to vary."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.findings import CaseError, Failure
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import correct
from gxpo_conformance.protocol import DTYPES, check_capabilities
from gxpo_conformance.runs import play
from gxpo_conformance.runs.build import cached
from gxpo_conformance.runs.focus import FOCUS, random_run
from gxpo_conformance.runs.levels import FACTORS, SIMPLEST, Levels

CLAUSES = list(dict.fromkeys(key.partition("/")[0] for key in FOCUS))
NAMES = ("EST-02#1", "CLP-02#4", "GAT-18#3", "NUM-03#4", "CKP-06#2", "RND-01#0/5", "RND-02#0/117", "RND-02#7/3")


def harness_in(dtype: str, foremost: bool = True) -> Harness:
    """Around a right model that has every option."""
    port = correct()[0]
    return Harness(port, check_capabilities(port.capabilities()), dtype, "cpu", None, foremost)


# ----------------------------------------------------------------------------------------------- the same for everybody


def said(value: Any, digits: int) -> Any:
    """All that is in it, numbers to so many digits."""
    if isinstance(value, dict):
        return {k: said(v, digits) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [value.dtype.name, list(value.shape), said(value.ravel().tolist(), digits)]
    if isinstance(value, list | tuple):
        return [said(v, digits) for v in value]
    return f"{value:.{digits}g}" if isinstance(value, float) else repr(value)


def digests(digits: int) -> dict[str, str]:
    """A short hash of each plan of NAMES. To nine digits, other processors' last bits do not count."""
    cached.cache_clear()
    made = {}
    for name in NAMES:
        plan = play.named(name, harness_in("float64")).plan("float64")
        steps = [[s.script, s.losses, s.event.odd, s.event.at, s.statistic, s.raises.__name__] for s in plan.steps]
        text = json.dumps(said([plan.config, plan.start, steps], digits))
        made[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return made


# Where the generator is changed on purpose: print(digests(9)).
PINNED = {
    "EST-02#1": "da29cc6369a5",
    "CLP-02#4": "cb8cd9f31d56",
    "GAT-18#3": "7f3bc8b60672",
    "NUM-03#4": "69f6d8f04447",
    "CKP-06#2": "71160c8ea3ed",
    "RND-01#0/5": "2f1fde107970",
    "RND-02#0/117": "14a332b7219b",
    "RND-02#7/3": "2fafdcce8e99",
}


def test_a_name_gives_the_same_run_whenever_it_is_made() -> None:
    """Somebody's report would name a run that is another one for whoever wants to play it."""
    assert digests(9) == PINNED
    assert len(set(PINNED.values())) == len(NAMES)
    assert digests(17) == digests(17)


@pytest.mark.parametrize("hashed", ["1", "2"])
def test_another_process_gives_the_same_run(hashed: str) -> None:
    """Sets and hashes of texts are in another order there."""
    code = "import json, test_awkward_runs as t; print(json.dumps(t.digests(17)))"
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": here, "PYTHONHASHSEED": hashed}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    assert json.loads(done.stdout) == digests(17)


# ----------------------------------------------------------------------------------------------- fit to be judged by


@functools.cache
def played(dtype: str, foremost: bool) -> dict[str, list[str]]:
    """All runs of a verdict, put to a right model: names by what came of them."""
    harness, found = harness_in(dtype, foremost), {"fits": [], "unfit": [], "fails": [], "empty": [], "short": []}
    for clause in (c for c in [*CLAUSES, *play.RANDOM_RUNS] if dtype in CHECKS[c].dtypes):
        for awkward in play.runs_of(clause, harness):
            harness.talks.clear()
            steps, events = len(awkward.plan(dtype).steps), len(awkward.events)
            if not steps:
                found["empty"].append(awkward.name)
            elif steps < 0.7 * events:
                found["short"].append(awkward.name)
            try:
                play.play(harness, awkward)
                found["fits"].append(awkward.name)
            except CaseError:
                found["unfit"].append(awkward.name)
            except Failure:
                found["fails"].append(awkward.name)
    return found


@pytest.mark.parametrize(("dtype", "foremost"), [("float64", False), ("float32", True), ("bfloat16", False)])
def test_rounding_does_not_decide_the_runs(dtype: str, foremost: bool) -> None:
    """A run that cannot be judged shows nothing, and the suite passes over it in silence."""
    found = played(dtype, foremost)
    assert found["fails"] == []
    total = sum(len(found[kind]) for kind in ("fits", "unfit"))
    assert total > (650 if foremost else 50)
    assert len(found["unfit"]) <= 0.01 * total, found["unfit"]
    assert len(found["empty"] + found["short"]) <= 0.03 * total, found  # nor one with hardly a step that could be made


def test_every_clause_with_runs_has_some_that_can_be_made() -> None:
    """A clause whose every step rounding decides would be shown by nothing but its fixed cases."""
    for dtype in DTYPES:
        harness = harness_in(dtype)
        for clause in (c for c in CLAUSES if dtype in CHECKS[c].dtypes):
            first = list(play.runs_of(clause, harness))[:: play.SHARE]
            assert any(awkward.plan(dtype).steps for awkward in first), f"{clause} in {dtype}"


# ------------------------------------------------------------------------------------------- what they promise to vary


def pairs(levels: Levels) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(levels.items(), 2)}


def possible_pairs(vary: dict[str, tuple[Any, ...]]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(vary, 2) for x in vary[a] for y in vary[b]}


def test_runs_belong_to_clauses() -> None:
    """Runs under a number that there is not would be played by nobody."""
    assert set(CLAUSES) <= set(clauses())
    assert set(play.RANDOM_RUNS) <= set(clauses())
    assert {c for c in clauses() if play.has_runs(c)} == {*CLAUSES, *play.RANDOM_RUNS}
    for key, focus in FOCUS.items():
        for factor, among in focus.vary.items():
            assert set(among) <= set(FACTORS[factor]), f"{key} varies {factor} over what it does not have"
    for clause in CLAUSES:
        names = [name for name, _ in play.planned(clause)]
        assert names == [f"{clause}#{n + 1}" for n in range(len(names))]


def test_most_pairs_of_settings_meet_in_the_runs_of_a_clause() -> None:
    """A mistake hides where its rule is never seen under the setting that shows it. So few runs a clause cannot have
    every pair; all clauses together have most, the random runs nearly all of the rest."""
    promised = covered = 0
    everywhere: set[frozenset[tuple[str, Any]]] = set()
    for key, focus in FOCUS.items():
        own, due = set[frozenset[tuple[str, Any]]](), possible_pairs(focus.vary)
        for levels, _ in focus.plan(key):
            own |= pairs(levels)
            everywhere |= pairs({**SIMPLEST, **levels})
        promised, covered = promised + len(due), covered + len(own & due)
        assert len(own & due) > 0.25 * len(due), key
    assert covered > 0.5 * promised
    due = possible_pairs(FACTORS)
    assert len(everywhere & due) > 0.75 * len(due)
    for name, count in play.RANDOM_RUNS.items():
        for n in range(count):
            everywhere |= pairs({**SIMPLEST, **random_run(f"{name}#0/{n}", name == "RND-02")[0]})
    assert len(everywhere & due) > 0.92 * len(due)


def test_every_level_is_in_some_run() -> None:
    for factor, levels in FACTORS.items():
        seen = {row.get(factor, levels[0]) for key, focus in FOCUS.items() for row, _ in focus.plan(key)}
        assert seen >= set(levels), factor


def test_further_dtypes_have_a_share() -> None:
    """All of them in every dtype would take a verdict's time three times over; none, and float32 would go unseen."""
    whole, share = (list(play.runs_of("NUM-03", harness_in("float32", first))) for first in (True, False))
    assert [a.name for a in share] == [a.name for a in whole][:: play.SHARE]
    assert len(share) >= 2


def test_a_seed_gives_other_random_runs() -> None:
    """`--seed 7` that plays those of seed 0 would be no second look."""
    for clause, count in play.RANDOM_RUNS.items():
        made = [list(play.runs_of(clause, harness_in("float64"), seed)) for seed in (0, 7)]
        assert [len(runs) for runs in made] == [count, count]
        assert made[0][0].name == f"{clause}#0/0"
        assert made[1][0].name == f"{clause}#7/0"
        same = [a.name for a, b in zip(*made, strict=True) if (a.levels, a.events) == (b.levels, b.events)]
        assert len(same) <= 2, same
