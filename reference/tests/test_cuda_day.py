"""A day on a GPU, as far as it can be tried without one: what is run, how parts end, what the report says of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gxpo_reference.benchmarks import cli as benchmarks
from gxpo_reference.benchmarks.cuda_day import cli, outcomes, report, run
from gxpo_reference.benchmarks.cuda_day.parts import MODELS, TESTS, TOYS, Part, checkout, parts
from gxpo_toy_tasks.tasks.table import TASKS

ROOT = Path(__file__).parents[2]


def test_without_cuda_it_says_so_and_names_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(["cuda-day"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "sees no CUDA device" in said
    assert "--device cpu --quick" in said


def test_a_dry_run_ends_with_a_report_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that somebody pays for by the hour, this is what must not be found out there."""
    day = ["cuda-day", "--device", "cpu", "--quick", "--out", str(tmp_path / "day"), "--only", "overhead-float32"]
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(day)
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert "[2 of 2] overhead-float32: what GXPO adds" in said
    page = (tmp_path / "day" / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# cpu: 2 parts passed, 0 failed, 0 left out, ")
    assert "A dry run on a CPU" in page
    assert "| float32 | matrices: 2 of 64 x 64 |" in page
    found = json.loads((tmp_path / "day" / "report.json").read_text(encoding="utf-8"))
    assert [part["outcome"] for part in found["parts"]] == ["passed", "passed"]
    assert found["parts"][0]["figures"]["torch"] == torch.__version__
    assert "growth-1e5-bfloat16" in found["not_run"]

    ran: list[str] = []
    monkeypatch.setattr(cli, "run", lambda part, *rest: ran.append(part.name) or stand_in(part))
    assert cli.main(day[1:]) == 0
    assert ran == ["environment"]
    assert "overhead-float32: passed before" in capsys.readouterr().out
    assert cli.main([*day[1:], "--again"]) == 0
    assert ran == ["environment", "environment", "overhead-float32"]
    with pytest.raises(SystemExit):
        cli.main([*day[1:3], *day[4:]])  # not quick
    assert "holds a day with --device cpu --quick: give another folder, or --again" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is run


def stand_in(part: Part, **found: Any) -> run.Record:
    figures = {"environment": {"torch": torch.__version__, "device": "cpu", "free_memory": 10**9}}.get(part.kind, {})
    return run.Record(part.name, part.kind, part.about, "python", **{"figures": figures, **found})


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_program_takes(quick: bool, tmp_path: Path) -> None:
    """A misspelt option would show on the GPU alone, and cost the whole part."""
    every = parts(tmp_path, "cpu" if quick else "cuda", quick)
    assert len({part.name for part in every}) == len(every)
    for part in every:
        module, *arguments = part.command[1:]
        if part.kind == "benchmark":
            assert module == "gxpo_reference.benchmarks"
            given = benchmarks.parser().parse_args(arguments)
            assert given.out == part.writes
            assert given.quick == quick
        if part.kind == "tests":
            named = [name for name in arguments if "tests" in name and not name.startswith("--")]
            assert all((ROOT / name).exists() for name in named), named
    sized = {part.name.split("-", 1)[1] for part in every if part.name.startswith("growth-1e9")}
    assert sized == (set() if quick else {"1e9-float32", "1e9-bfloat16"})


def test_all_that_there_is_is_in_it() -> None:
    """A folder of tests or a toy task that came later would not be run."""
    assert set(TOYS) == set(TASKS)
    assert checkout() == ROOT
    assert {where for where, _ in TESTS.values()} == {str(p.relative_to(ROOT)) for p in ROOT.glob("**/tests")}
    assert all((ROOT / where / one).exists() for where, one in TESTS.values())
    assert min(MODELS) == 10**8
    assert max(MODELS) == 10**9


def test_sizes_that_do_not_fit_are_left_out_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = parts(tmp_path, "cuda", False)
    facts = {"free_memory": 24 * 10**9}
    why = {part.name: cli.left_out(part, facts) for part in every if part.bytes}
    assert why["growth-1e8-float32"] == why["memory-3e8-float32"] == ""
    assert why["growth-1e9-float32"] == "needs about 64.0 GB, 24.0 GB free"
    assert why["growth-1e9-bfloat16"] != ""
    part = Part("x", "toy", "", (), 1, tmp_path, needs=("a_package_that_is_not_there",))
    assert cli.left_out(part, facts) == "a_package_that_is_not_there not installed"


def test_only_takes_names_and_beginnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = parts(tmp_path, "cpu", True)
    for only, wanted in ((["tests"], ["tests"]), (["toy", "trl"], ["toy-bandit", "toy-sort3", "trl"])):
        assert [part.name for part in cli.chosen(every, only)] == ["environment", *wanted]
    assert cli.chosen(every, None) == every
    with pytest.raises(SystemExit):
        cli.main(["--device", "cpu", "--only", "nothing"])
    assert "--only nothing: no part's name begins so" in capsys.readouterr().err
    assert cli.main(["--device", "cpu", "--list", "--only", "conformance"]) == 0
    assert "python -m gxpo_conformance.cli --device cpu" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ how parts end


def part_of(tmp_path: Path, code: str, kind: str = "benchmark") -> Part:
    return Part("part", kind, "what it is", ("-c", code), 1.0, tmp_path / "figures")


FINITE = '{"config": {}, "results": {"overhead": [{"share": {"median": 0.5}}]}}'
ODD = '{"config": {}, "results": {"overhead": [{"share": {"median": NaN}}]}}'
NONE_FITS = '{"config": {}, "results": {"growth": [{"skipped": "skipped: needs about 9 GB"}]}}'


@pytest.mark.parametrize(
    ("code", "outcome", "why"),
    [
        (f"open('figures', 'w').write('{FINITE}')", "passed", ""),
        (f"open('figures', 'w').write('{ODD}')", "failed", "figures that are not finite"),
        (f"open('figures', 'w').write('{NONE_FITS}')", "left out", "needs about 9 GB"),
        ("pass", "failed", "no figures: FileNotFoundError"),
        ("raise RuntimeError('torch.OutOfMemoryError: CUDA out of memory')", "left out", "out of memory"),
        ("raise RuntimeError('device-side assert')", "failed", "exit status 1: RuntimeError: device-side assert"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "ended by SIGKILL: out of memory?"),
    ],
)
def test_how_a_part_ends_is_what_is_kept(code: str, outcome: str, why: str, tmp_path: Path) -> None:
    """Whatever breaks in one part, the others go on, and its reason is not lost."""
    record = run.run(part_of(tmp_path, f"import os; os.chdir({str(tmp_path)!r}); {code}"), tmp_path, "cpu")
    assert record.outcome == outcome, record
    assert record.why.startswith(why)
    assert bool(record.log_ends) == (outcome == "failed" and why.startswith("exit"))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    code = f"{child}; sys.stdout.flush(); import time; time.sleep(60)"
    began = time.monotonic()
    record = run.run(part_of(tmp_path, code), tmp_path, "cpu", limit=2.0)
    assert time.monotonic() - began < 30
    assert record.outcome == "failed"
    assert record.why.startswith("not done within 0.0333 min")
    started = int((tmp_path / "part.log").read_text(encoding="utf-8").split()[0])
    for _ in range(50):
        try:
            os.kill(started, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{started}/stat").exists() and ") Z " in Path(f"/proc/{started}/stat").read_text():
            return  # nobody has asked how it ended
        time.sleep(0.1)
    raise AssertionError("what it started goes on")


def test_interrupted_it_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(part: Part, *rest: Any) -> run.Record:
        if part.name == "conformance":
            raise KeyboardInterrupt
        figures = {"passed": 1, "failed": [], "skipped": {}}
        return stand_in(part) if part.kind == "environment" else stand_in(part, figures=figures)

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    assert "2 parts passed" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_no_part_is_tried_where_the_environment_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A torch that was not built for this GPU would fail forty times."""

    def broken(part: Part, *rest: Any) -> run.Record:
        return stand_in(part, outcome="failed", why="no kernel image", figures={}, log_ends=["the log's last line"])

    monkeypatch.setattr(cli, "run", broken)
    assert cli.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "the log's last line" in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# cpu: 0 parts passed, 1 failed")


# ---------------------------------------------------------------------------------------------- what the report says

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_right"/>
<testcase classname="tests.test_a" name="test_wrong[cuda]"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.test_a" name="test_late"><skipped message="this torch is too old"/></testcase>
<testcase classname="" name="tests.test_b">
<skipped message="collection skipped">('b.py', 3, 'Skipped: TRL is not installed')</skipped></testcase>
</testsuite></testsuites>"""
SUITE = [
    {"record": "header", "dtypes": ["float64"]},
    {"clause": "EXT-01", "dtype": "float64", "verdict": "pass", "message": ""},
    {"clause": "EXT-02", "dtype": "float64", "verdict": "fail", "message": "theta~ is off | by 2\nmore"},
    {"headline": "1/2 MUST", "words": "not conformant", "exit_status": 1},
]


def test_the_verdict_comes_first_then_what_failed_then_why_tests_were_skipped(tmp_path: Path) -> None:
    (tmp_path / "tests").write_text(JUNIT, encoding="utf-8")
    (tmp_path / "suite").write_text("\n".join(json.dumps(line) for line in SUITE), encoding="utf-8")
    made = []
    for kind, file in (("tests", "tests"), ("conformance", "suite")):
        found = outcomes.read(kind, tmp_path / file, "the log", 1)
        made.append(run.Record(kind, kind, "", "python", "failed", found.why, figures=found.figures))
    assert made[0].why == "1 of 2 tests failed"
    assert made[1].why == "not conformant"
    report.write(tmp_path, made, ["trl"], "cuda", False)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    order = [
        "# cuda: 0 parts passed, 2 failed, 0 left out, 1 not run",
        "| tests | 1 of 2 tests failed |",
        "Not run: trl.",
        "- tests.test_a::test_wrong[cuda]: assert 1 == 2\n",
        "- EXT-02, float64: theta~ is off | by 2\n",
        "## Skipped tests: 2",
        "| 1 | this torch is too old |",
        "| 1 | tests.test_b: TRL is not installed |",
        "| tests | 1 | 1 | 2 | 0 |",
        "| float64 | 1 fail, 1 pass |",
    ]
    places = [page.find(text) for text in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)


def test_a_models_line_is_put_together_from_three_parts() -> None:
    ratio = {"ratio": {"median": 1.0312}}
    contenders = {"GXPO": ratio, "GXPO, after fallback": ratio}
    peaks = {"plain, clipped": {"peak_bytes": 1200}, "GXPO": {"peak_bytes": 2800}}
    results = {
        "growth-1e8-float32": {"growth": [{"kind": "transformer", "steps": {"contenders": contenders}}]},
        "memory-1e8-float32": {"memory": {"contenders": peaks, "parameter_bytes": 400}},
        "overhead-1e8-float32": {"overhead": [{"share": {"median": 0.617}}]},
        "overhead-1e9-bfloat16": {"overhead": [{"skipped": "skipped: needs"}]},
        "overhead-float32": {"overhead": [{"share": {"median": 9.0}}]},
    }
    _, first, second = report.models(results)
    assert first == ("1e8", "float32", "1.031", "1.031", "0.62", "4.00 x parameters", "8.00 x parameters")
    assert second == ("1e9", "bfloat16", "", "", "", "", "")
