"""The port in JavaScript: the method written a second time, in another language, from SPEC.md alone."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.process.load import load
from gxpo_conformance.process.stdio import StdioPort
from gxpo_conformance.protocol import config, everything
from gxpo_conformance.search import search
from gxpo_conformance.trial import PASS, Trial, judge

NODE = shutil.which("node") or ""
PORT = Path(str(resources.files("gxpo_reference").joinpath("ports", "gxpo_port.mjs")))

pytestmark = pytest.mark.skipif(not NODE, reason="needs node (Node.js) on the path")


@pytest.fixture
def port() -> Iterator[StdioPort]:
    with load(None, shlex.join([NODE, str(PORT)]), 30.0) as started:
        yield started


def talk(*messages: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Everything said at once: the exit status and the answers."""
    said = "".join(json.dumps(message) + "\n" for message in messages)
    done = subprocess.run([NODE, str(PORT)], input=said, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def start(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    where = {"session": 1, "dtype": "float32", "device": "cpu"}
    return {"op": "start", **where, "config": config(**changes), "params": params}


def test_it_is_conformant_with_everything_declared(port: StdioPort) -> None:
    """SPEC.md would not be enough to write a port from, or the suite would reject a right one in another language."""
    verdict = judge(port)
    assert verdict.failed == []
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"
    assert verdict.which(PASS) == [c.id for c in clauses().values() if "in process" not in c.needs]
    ran = {r.dtype for r in verdict.every() if r.verdict == PASS}
    assert ran == {"float64", "float32"}


def test_it_declares_everything_but_what_javascript_lacks(port: StdioPort) -> None:
    """A suite that a port passes by declaring little shows nothing about the clauses left out."""
    assert port.capabilities() == {**everything(), "dtypes": ["float64", "float32"], "devices": ["cpu"]}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_cases_do_not_reject_it(port: StdioPort, seed: int, dtype: str) -> None:
    """Options that are right one by one would go wrong together, as in somebody's training run."""
    harness = Trial(port, [dtype]).harnesses[dtype]
    assert search(harness, seed, 30) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"horizon": 1}, "horizon"),
        ({"horizon": 2.5}, "horizon"),
        ({"estimator": "oracle"}, "oracle"),
        ({"gate": {"statistic": "entropy"}}, "entropy"),
        ({"gate": {"window": 0}}, "window"),
    ],
)
def test_a_bad_config_is_refused_by_name(port: StdioPort, changes: dict[str, Any], named: str) -> None:
    """A typo in a config would train with something else than what was asked for."""
    with pytest.raises(ValueError, match=named):
        port.start({"w": np.zeros(2)}, config(**changes))
    port.start({"w": np.zeros(2)}, config())  # and the process is still there


def test_a_step_without_the_statistic_that_its_gate_watches_is_an_error(port: StdioPort) -> None:
    """The gate would compare undefined with a number, which is never surprising: it would never close."""
    session = port.start({"w": np.ones(2)}, config(gate={"statistic": "supplied"}))
    with pytest.raises(RuntimeError, match="the step needs a finite number, got undefined"):
        session.step(lambda params: (0.5, params))
    session.step(lambda params: (0.5, params), statistic=0.7)


def test_an_unknown_request_is_an_error_and_no_end() -> None:
    """A suite of a later version, with a request more, would find the port dead and not know why."""
    status, (refused, lost, greeted) = talk(
        {"op": "dance"}, {"op": "params", "session": 7}, {"op": "hello", "protocol": 1}, {"op": "bye"}
    )
    assert refused == {"error": "there is no op dance"}
    assert lost == {"error": "there is no session 7"}
    assert greeted["name"]
    assert status == 0


def test_bye_ends_the_process_with_status_0() -> None:
    """Whoever drives the port from a script would take a clean run for a crash, or wait for ever."""
    assert talk({"op": "bye"}) == (0, [])
    assert talk() == (0, [])  # so does the end of standard input: nobody is left to speak to


def test_float32_values_and_names_survive_the_wire() -> None:
    """Parameters that change by being looked at: every comparison with another implementation would be off."""
    values = [float(np.float32(0.1)), 2.0**-149, float(np.finfo(np.float32).max), "NaN", "-Infinity", -1e-10]
    rounded = [*values[:5], float(np.float32(-1e-10))]
    sent = {name: {"shape": [2, 3], "data": values} for name in ("größe", "10", "2", "__proto__")}
    status, answers = talk(start(sent), {"op": "params", "session": 1}, {"op": "bye"})
    assert status == 0
    assert answers == [{"ok": True}, {"params": {name: {"shape": [2, 3], "data": rounded} for name in sent}}]
