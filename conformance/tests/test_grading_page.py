"""GRADING.md does what it says: its files are written, its commands run; and submissions that would rather not be
judged come to no more points than those that are."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_grading import RESULTS, valid

PAGE = resources.files("gxpo_conformance").joinpath("GRADING.md").read_text(encoding="utf-8")
PORTING = resources.files("gxpo_conformance").joinpath("PORTING.md").read_text(encoding="utf-8")
METHOD, ADAPTER, *_ = re.findall(r"^```python\n(.*?)^```$", PORTING, re.M | re.S)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
GAP, SETUP, AUTOGRADER, POINTS_FILE, WORKFLOW = (
    next(text for kind, text in BLOCKS if kind == wanted and mark in text)
    for wanted, mark in (("python", "def"), ("bash", "pip"), ("bash", "--exec"), ("toml", "total"), ("yaml", "jobs"))
)
PLAIN = r"def extrapolation_scale.*?\n\n\n"


def marks(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, results.json and what was printed, of the port in `folder`."""
    command = [sys.executable, "-m", "gxpo_conformance.cli", "--impl", "my_port:Port", "--gradescope", "results.json"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, valid((folder / "results.json").read_text(encoding="utf-8")), done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_gxpo.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "my_port.py").write_text(ADAPTER, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("where", "does", "says"),
    [
        ("import", "raise ImportError('no such thing')", "no such thing"),
        ("import", "import sys; sys.exit(0)", "SystemExit"),
        ("import", "import os; os._exit(0)", "did not come to an end"),
        ("step", "import os; os._exit(0)", "did not come to an end"),
    ],
)
def test_a_submission_that_ends_the_suite_has_no_points(folder: Path, where: str, does: str, says: str) -> None:
    """Without a result Gradescope shows an error of the autograder, which is the lecturer's to explain; and a run that
    ends with status 0 looks like one with full marks."""
    method = (
        f"{does}\n{METHOD}"
        if where == "import"
        else METHOD.replace("        theta0, s0 =", f"        {does}\n        theta0, s0 =")
    )
    assert method != METHOD
    (folder / "my_gxpo.py").write_text(method, encoding="utf-8")
    _, made, _ = marks(folder, "--only", "MOV")
    assert made["score"] == 0
    assert says in made["output"]
    assert [t["max_score"] for t in made["tests"]] == [4]


def test_a_submission_that_hangs_is_marked(folder: Path) -> None:
    """It would hold the autograder until Gradescope kills it."""
    hangs = METHOD.replace("        theta0, s0 =", "        while self.momentum == 0.0: pass\n        theta0, s0 =")
    (folder / "my_gxpo.py").write_text(hangs, encoding="utf-8")
    status, made, _ = marks(folder, "--only", "OPT,EXT-06", "--time-limit", "0.3", "--dtype", "float64")
    assert status == 1
    assert {t["name"][:6]: t["status"] for t in made["tests"]}["OPT-01"] == "failed"


def test_the_exit_status_is_about_points(folder: Path) -> None:
    """A runner that gives points for status 0 would never give any: with --only the verdict is incomplete, 3."""
    status, made, said = marks(folder, "--only", "EST,EXT")
    assert (status, made["score"]) == (0, 9)
    assert said.splitlines()[-1] == "marks: 9 of 9 points"
    (folder / "my_gxpo.py").write_text(METHOD.replace("1e-3 *", "1e-2 *"), encoding="utf-8")
    status, made, said = marks(folder, "--only", "EST,EXT")
    assert status == 1
    assert made["score"] < 9
    assert {t["name"][:6] for t in made["tests"] if t["status"] == "failed"} >= {"EST-02"}


# ---- GRADING.md ------------------------------------------------------------------------------------------------------


def test_the_commands_print_what_the_page_shows(folder: Path) -> None:
    (folder / "points.toml").write_text(POINTS_FILE, encoding="utf-8")
    shown = iter(BLOCKS)
    ran = 0
    for kind, command in shown:
        if kind == "sh":
            done = subprocess.run(
                [sys.executable, "-m", "gxpo_conformance.cli", *command.split()[1:]],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert next(shown)[1] in done.stdout, done.stdout + done.stderr
            ran += 1
    assert ran == 2


def test_the_gap_costs_its_clauses(folder: Path) -> None:
    """An exercise that is solved by leaving it empty."""
    assert len(re.findall(PLAIN, METHOD, re.S)) == 1
    (folder / "my_gxpo.py").write_text(re.sub(PLAIN, lambda _: f"{GAP}\n\n", METHOD, flags=re.S), encoding="utf-8")
    status, made, _ = marks(folder, "--only", "EXT")
    assert status == 1
    passed = [t["name"][:6] for t in made["tests"] if t["status"] == "passed"]
    assert passed == ["EXT-06"]  # the refusal of a bad horizon is not in the gap
    assert "should be" in made["tests"][0]["output"]


@pytest.fixture
def autograder() -> Iterator[Path]:
    """/autograder, as setup.sh leaves it: the suite is installed in this environment."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        root = Path(name)
        root.chmod(0o755)
        for part in ("source", "submission", "results"):
            (root / part).mkdir()
        (root / "suite").symlink_to(sys.prefix)
        (root / "source" / "my_port.py").write_text(ADAPTER, encoding="utf-8")
        (root / "source" / "points.toml").write_text(POINTS_FILE, encoding="utf-8")
        (root / "source").chmod(0o700)
        (root / "submission" / "my_gxpo.py").write_text(METHOD, encoding="utf-8")
        yield root


SETPRIV = re.search(r'"(setpriv .*?)\$serve"', AUTOGRADER)


def can_change_user() -> bool:
    assert SETPRIV
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return False
    probe = [*SETPRIV[1].split(), sys.executable, "-c", "import gxpo_conformance"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def graded(root: Path) -> dict[str, Any]:
    assert SETPRIV
    script = AUTOGRADER if can_change_user() else AUTOGRADER.replace(SETPRIV[1], "")
    (root / "run_autograder").write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["bash", "run_autograder"],
        cwd=root,
        env={**os.environ, "AUTOGRADER": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    found = json.loads((root / "results" / "results.json").read_text(encoding="utf-8"))
    return {**found, "printed": done.stdout + done.stderr}


def test_run_autograder_marks(autograder: Path) -> None:
    made = graded(autograder)
    printed = made.pop("printed")
    jsonschema.validate(made, RESULTS)
    assert made["score"] == 100, printed
    (autograder / "submission" / "my_gxpo.py").unlink()
    shutil.rmtree(autograder / "port")
    made = graded(autograder)
    assert made["score"] == 0
    assert "my_gxpo" in made["output"]


@pytest.mark.parametrize(
    "line", ["from gxpo_reference.oracle import Oracle", "import gxpo as g", "o = __import__('gxpo_' + 'reference')"]
)
def test_run_autograder_refuses_the_suites_own_answers(autograder: Path, line: str) -> None:
    (autograder / "submission" / "my_gxpo.py").write_text(f"{line}\n{METHOD}", encoding="utf-8")
    made = graded(autograder)
    assert made["score"] == 0
    assert "does not allow" in made["output"]


@pytest.mark.skipif(not can_change_user(), reason="needs root and setpriv, as an autograder has them")
def test_a_submission_cannot_write_its_own_marks(autograder: Path) -> None:
    results = autograder / "results" / "results.json"
    attack = (
        "import pathlib, atexit\n"
        "def write():\n"
        f"    pathlib.Path({str(results)!r}).write_text('{{\"score\": 100}}')\n"
        "atexit.register(write)\n"
        "try: write()\n"
        "except OSError: pass\n"
    )
    wrong = METHOD.replace("self.alpha * q[k]", "q[k]")
    assert wrong != METHOD
    (autograder / "submission" / "my_gxpo.py").write_text(attack + wrong, encoding="utf-8")
    made = graded(autograder)
    assert 0 < made["score"] < 100, made["printed"]


def test_the_scripts_and_the_workflow_can_be_read(folder: Path) -> None:
    for script in (SETUP, AUTOGRADER):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    steps = yaml.safe_load(WORKFLOW)["jobs"]["marks"]["steps"]
    (command,) = (s["run"] for s in steps if s.get("run", "").startswith("gxpo-conformance"))
    (folder / "points.toml").write_text(POINTS_FILE, encoding="utf-8")
    here = shlex.split(command.replace("python -m", f"{sys.executable} -m"))
    done = [sys.executable, "-m", "gxpo_conformance.cli", *here[1:]]
    assert subprocess.run(done, cwd=folder, capture_output=True, check=False, timeout=120).returncode == 0
    ends = METHOD.replace("        theta0, s0 =", "        __import__('os')._exit(0)\n        theta0, s0 =")
    (folder / "my_gxpo.py").write_text(ends, encoding="utf-8")
    assert subprocess.run(done, cwd=folder, capture_output=True, check=False, timeout=120).returncode == 1
    assert {p.name for p in folder.glob("marks.*")} == {"marks.xml", "marks.html"}
