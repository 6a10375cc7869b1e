"""What a port does not declare it is not given: no setting, no accident, no request."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from fewer_runs import few_runs

from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.clauses.table import CHECKS, clauses
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.protocol import (
    CAPABILITIES,
    CORE,
    NEVER_FULL,
    Arrays,
    Config,
    Gradient,
    check_capabilities,
    config,
    declares,
    everything,
)
from gxpo_conformance.runs import play
from gxpo_conformance.runs.build import settings
from gxpo_conformance.runs.dice import Dice
from gxpo_conformance.runs.focus import ACCIDENTS
from gxpo_conformance.stored import needs
from gxpo_conformance.trial import applies, judge

BARE = {**{key: [enough[0]] for key, enough in CORE.items()}, "dtypes": ["float64"], "devices": ["cpu"]}
BARE["optimizer_state"] = ["keep"]
ALL = {**everything(), "dtypes": ["float64"], "devices": ["cpu"]}
NO_SUPPLIED = {**ALL, "gate_statistics": [s for s in ALL["gate_statistics"] if s != "supplied"]}


def needed(made: Config) -> set[str]:
    """What a port must declare to be given this configuration."""
    return set(needs({"config": made, "dtype": "float64", "steps": []}))


class Witness(oracle_adapter.Port):
    """The oracle, with what `declared` says; keeps what it is given, and what a port needs for what is asked."""

    def __init__(self, declared: dict[str, Any]) -> None:
        self.declared, self.configs, self.used = declared, list[Config](), set[str]()

    def capabilities(self) -> dict[str, Any]:
        return self.declared

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Any:
        self.configs.append(copy.deepcopy(config))
        self.used |= needed(config)
        return WitnessSession(super().start(params, config, dtype, device).oracle, self)


class WitnessSession(oracle_adapter.Session):
    def __init__(self, oracle: Any, port: Witness) -> None:
        super().__init__(oracle)
        self.port = port

    def step(self, grad: Gradient, **given: Any) -> None:
        self.port.used |= {f"gate_statistics:{'supplied' if key == 'statistic' else key}" for key in given}
        super().step(lambda params: self.told(grad, params), **given)

    def told(self, grad: Gradient, params: Arrays) -> tuple[float, Arrays]:
        try:
            loss, grads = grad(params)
        except BaseException:
            self.port.used.add("exceptions")
            raise
        self.port.used |= set() if math.isfinite(loss) else {"nonfinite_losses"}
        finite = all(np.isfinite(g).all() for g in grads.values())
        self.port.used |= set() if finite else {"nonfinite_gradients"}
        return loss, grads

    def save(self) -> Any:
        self.port.used.add("checkpoint")
        return super().save()


@pytest.mark.parametrize(
    "declared",
    [BARE, {**BARE, "gate_baselines": ["ema"], "optimizer_state": ["restore"]}, NO_SUPPLIED],
    ids=["core", "ema alone", "all but supplied"],
)
def test_a_port_is_given_what_it_declares_and_all_of_it(declared: dict[str, Any]) -> None:
    """A right port would be judged by what it never said it does; or an option that it declares would go untried."""
    witness = Witness(declared)
    with few_runs():
        verdict = judge(witness)
    assert verdict.failed == []
    assert verdict.exit_status == 0
    checked = check_capabilities(declared)
    assert {need for need in witness.used if not declares(checked, need)} == set()
    lists = {f"{key}:{value}" for key, c in CAPABILITIES.items() if isinstance(c, tuple) for value in checked[key]}
    flags = {key for key, choices in CAPABILITIES.items() if choices is bool and checked[key]}
    assert (lists | flags) - witness.used == {"devices:cpu"}


def test_what_is_not_declared_is_switched_off_in_what_is_sent() -> None:
    """A port without an option would have to read it in order to refuse it."""
    witness = Witness(BARE)
    for clause in ("EST-01", "EXT-01", "OPT-02", "GAT-01", "NUM-01", "RND-01"):
        harness = Harness(witness, check_capabilities(BARE), "float64", "cpu")
        CHECKS[clause].function(harness)
        for awkward in play.runs_of(clause, harness):
            play.play(harness, awkward)
    off = {"patience": 1, "two_sided": False, "warmup": 0, "cooldown": None, "max_active_steps": None}
    off |= {"statistic": "corrective_norm", "baseline": "window"}
    assert len(witness.configs) > 100
    for made in witness.configs:
        assert {**made["gate"], **off} == made["gate"]
        assert made["optimizer"].keys() == config()["optimizer"].keys()
        assert (made["estimator"], made["optimizer_state"], made["max_grad_norm"]) == ("gradient", "keep", None)
        assert 0 <= made["alpha"] <= 1
        assert 0 <= made["optimizer"]["momentum"] < 1


def without(need: str) -> dict[str, Any]:
    """Everything but this."""
    key, _, value = need.partition(":")
    return {**ALL, key: [v for v in ALL[key] if v != value] if value else False}


OPTIONS = [f"{key}:{value}" for key, c in CAPABILITIES.items() if isinstance(c, tuple) for value in c]
OPTIONS = [need for need in OPTIONS if not need.startswith(("dtypes", "devices"))]
OPTIONS = [need for need in OPTIONS if need not in ("optimizers:sgd", "estimators:gradient")]
OPTIONS = [need for need in OPTIONS if need != "gate_statistics:corrective_norm"]
OPTIONS += [key for key, choices in CAPABILITIES.items() if choices is bool]


@pytest.mark.parametrize("lacking", OPTIONS)
def test_no_awkward_run_has_what_is_lacking(lacking: str) -> None:
    """One option left out is what most ports are: the rest must still be put together, without it."""
    harness = Harness(oracle_adapter.Port(), check_capabilities(without(lacking)), "float64", "cpu")
    names = set[str]()
    for clause in (c for c in clauses().values() if play.has_runs(c.id) and applies(c, harness.capabilities)):
        for awkward in play.runs_of(clause.id, harness):
            names.add(awkward.name)
            made = settings(awkward.levels, Dice(awkward.name, "run"))
            made["max_grad_norm"] = None if awkward.levels["clip"] == "off" else 1.0
            assert lacking not in needed(made), awkward.name
            assert lacking not in {ACCIDENTS.get(event.odd) for event in awkward.events}, awkward.name
            assert made["gate"]["window"] < NEVER_FULL
    assert {name[:3] for name in names} >= {"EST", "EXT", "MOV", "OPT", "GAT", "NUM", "DEV", "RND"}


def test_what_only_an_adapter_in_process_can_be_given_no_program_is() -> None:
    """A Ctrl-C cannot be sent over a pipe, nor an array with another layout."""
    away = Harness(oracle_adapter.Port(), check_capabilities(ALL) | {"in process": False}, "float64", "cpu")
    here = Harness(oracle_adapter.Port(), check_capabilities(ALL), "float64", "cpu")
    for harness, given in ((here, True), (away, False)):
        made = [play.named(f"RND-02#0/{n}", harness) for n in range(140)]
        made += play.runs_of("DEV-03", harness)
        assert any(awkward.untidy for awkward in made) is given
        assert any(event.odd == "interrupt" for a in made for event in a.events) is given
