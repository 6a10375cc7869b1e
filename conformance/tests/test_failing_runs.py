"""An awkward run that fails: made smaller, named, played again from its name and from its file; and what then waits."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ports_on_disk import ORACLE, put

from gxpo_conformance import cli
from gxpo_conformance.harness.harness import Harness
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.mutants.model import Functional, ModelPort
from gxpo_conformance.protocol import Arrays, check_capabilities
from gxpo_conformance.runs import play
from gxpo_conformance.runs.levels import SIMPLEST
from gxpo_conformance.trial import Verdict, judge

# No fixed case has this horizon.
ON_DISK = """\
from gxpo_conformance.mutants.model import Functional, ModelPort


class Far(Functional):
    def move(self, theta, q):
        made = super().move(theta, q)
        return {k: v * self.kind(1.01) for k, v in made.items()} if self.config["horizon"] == 33 else made


def Port():
    return ModelPort(Far, "far")
"""


class Decays(Functional):
    """Clips otherwise where AdamW has a decay, which no fixed case has together."""

    def clip(self, g: Arrays, norm: float) -> Arrays:
        clipped, optimizer = super().clip(g, norm), self.config["optimizer"]
        wrong = self.config["max_grad_norm"] and optimizer["name"] == "adamw" and optimizer["weight_decay"]
        return {k: v * self.kind(0.9) for k, v in clipped.items()} if wrong else clipped


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return put("far_port", ON_DISK, tmp_path, monkeypatch)


def first_failure(port: ModelPort, only: str) -> tuple[Verdict, Any]:
    verdict = judge(port, ["float64"], only=["OPT", *only.split(",")])
    return verdict, next(r for r in verdict.every() if r.verdict == "fail")


def test_a_failing_run_is_made_smaller_and_named() -> None:
    """Twenty settings and a dozen steps tell an author nothing."""
    _, failed = first_failure(ModelPort(Decays, "decays"), "CLP-02")
    name = failed.finding.run
    assert re.fullmatch(r"CLP-02#\d+", name)
    port = ModelPort(Decays, "decays")
    whole = play.named(name, Harness(port, check_capabilities(port.capabilities()), "float64", "cpu"))
    steps = len(whole.plan("float64").steps)
    told = re.search(rf"\(awkward run {name}, (\d+) of its {steps} steps: (.*)\)$", failed.message)
    assert told is not None, failed.message
    assert int(told[1]) == len(failed.talk.steps) == 1 < steps
    settings = told[2].split(", ")
    assert {"optimizer adamw", "decay"} <= set(settings)  # what it takes
    assert len(settings) <= 5 < sum(whole.levels[factor] != level for factor, level in SIMPLEST.items())


def test_its_name_and_its_file_play_it_again(far: str, tmp_path: Path, capsys: Any) -> None:
    """The author has a port to mend, and a debugger; from the report alone nothing can be stepped through."""
    arguments = ["--impl", far, "--only", "OPT,EXT", "--dtype", "float64", "--json", "out.jsonl"]
    assert cli.main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    (failed,) = [r for r in found if r.get("verdict") == "fail"]
    assert re.fullmatch(r"EXT-02#\d+", failed["run"])
    assert failed["rerun"] in printed
    program, *rerun = shlex.split(failed["rerun"])
    assert program == "gxpo-conformance"
    assert rerun[:2] == ["repro", failed["run"]]

    assert cli.main([*rerun, "--case", "case.json"]) == 1
    shown = capsys.readouterr().out
    number = re.search(r"FAIL .* is (\S+), should be", shown)
    assert number is not None
    assert f" is {number[1]}, should be" in failed["message"]  # the very same
    assert "right: " in shown
    (tmp_path / "theirs.json").write_text(json.dumps(failed["case"]), encoding="utf-8")
    for file in ("case.json", "theirs.json"):
        assert cli.main(["repro", file, "--impl", far]) == 1
        assert number[1] in capsys.readouterr().out
        assert cli.main(["repro", file, "--impl", ORACLE]) == 0
    assert cli.main(["repro", failed["run"], "--impl", ORACLE]) == 0


@pytest.mark.parametrize(("run", "status"), [("EXT-02#1", 0), ("RND-02#0/0", 0), ("EXT-02#1000", 2)])
def test_a_run_that_does_not_fail_is_played_too(run: str, status: int, far: str, capsys: Any) -> None:
    """Whoever has mended it wants to see it pass."""
    assert cli.main(["repro", run, "--impl", far, "--dtype", "float64"]) == status


def test_after_the_first_failure_the_runs_of_others_wait() -> None:
    """They put many rules together: one mistake would fail forty of them, and send its author to forty places."""
    namespace: dict[str, Any] = {}
    exec(ON_DISK, namespace)
    verdict = judge(namespace["Port"](), ["float64", "float32"], only=["OPT", "EXT", "MOV", "RND"])
    assert verdict.results["EXT-02"]["float64"].verdict == "fail"
    waiting = verdict.results["MOV-02"]["float64"]
    assert waiting.verdict == "pass"
    assert waiting.message == "its fixed cases alone; its awkward runs wait for EXT-02, which did not pass"
    for clause in ("RND-01", "RND-02"):
        blocked = verdict.results[clause]["float64"]
        assert (blocked.verdict, blocked.message) == ("blocked", "waits for EXT-02, which did not pass")
        assert verdict.results[clause]["float32"].verdict != "blocked"  # a dtype in which nothing has failed so far
    assert [r.clause.id for r in verdict.every() if r.verdict == "fail" and r.dtype == "float64"] == ["EXT-02"]


def test_a_failing_fixed_case_goes_before_every_run() -> None:
    """It says best what is wrong: one rule, small numbers."""
    verdict = judge(MUTANTS["alpha-on-excess"].port(), ["float64"], only=["OPT", "EST", "EXT", "MOV", "RND"])
    assert "MOV-01" in verdict.failed
    assert {r.finding.run for r in verdict.every() if r.finding} == {None}
    for clause in ("EST-01", "EXT-01", "EXT-02"):  # which come before it
        assert "its awkward runs wait for MOV-01" in verdict.results[clause]["float64"].message
    assert verdict.results["RND-01"]["float64"].message == "waits for MOV-01, which did not pass"


def test_the_seed_of_the_random_runs_is_chosen_and_said(far: str, tmp_path: Path, capsys: Any) -> None:
    """Somebody else could not play what was played here."""
    arguments = ["--impl", far, "--dtype", "float64", "--only", "RND", "--json", "out.jsonl"]
    names = set()
    for seed, more in (("0", []), ("7", ["--seed", "7"])):
        assert cli.main([*arguments, *more]) == 1
        printed = capsys.readouterr().out
        assert f"random runs by seed {seed}; end of report" in printed
        head, *results, _ = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(head)["seed"] == int(seed)
        names |= {name for r in results if (name := json.loads(r).get("run"))}
        assert any(f"#{seed}/" in name for name in names)
    assert len(names) >= 2
    assert cli.main(["--impl", ORACLE, "--only", "EXT-01", "--seed", "7"]) == 3
    assert "seed" not in capsys.readouterr().out  # nothing was drawn
