"""PORTING.md does what it says: its files are written, its commands run, their output compared with what is shown."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from fewer_runs import few_runs

from gxpo_conformance.known import read_known
from gxpo_conformance.process import load
from gxpo_conformance.protocol import CAPABILITIES
from gxpo_conformance.trial import judge

PAGE = resources.files("gxpo_conformance").joinpath("PORTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
METHOD, ADAPTER, TESTS = (text for kind, text in BLOCKS if kind == "python")
SLIP = ("self.alpha * q[k]", "(1 + self.alpha * (q[k] - 1))")  # section 6
TIMES = re.compile(r"\d+\.\d+ s\b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_gxpo.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "my_port.py").write_text(ADAPTER, encoding="utf-8")
    return tmp_path


def in_folder(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", *command]
    return subprocess.run(done, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_the_commands_print_what_the_page_shows(folder: Path) -> None:
    """A newcomer compares line by line, and stops trusting the page at the first that differs."""
    assert METHOD.count(SLIP[0]) == 1
    ran = 0
    for (kind, command), (next_kind, shown) in itertools.pairwise(BLOCKS):
        if kind != "sh":
            continue
        if "--only MOV " in command:  # what went before it on the page
            (folder / "my_gxpo.py").write_text(METHOD.replace(*SLIP), encoding="utf-8")
        done = in_folder(folder, "gxpo_conformance.cli", *command.split()[1:])
        assert next_kind == "text"
        assert TIMES.sub("", shown) in TIMES.sub("", done.stdout), done.stdout + done.stderr
        ran += 1
    assert ran == 3


def test_the_adapter_is_short() -> None:
    assert len([line for line in ADAPTER.splitlines() if line.strip()]) <= 30


def test_the_option_for_nothing_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 7: "exceptions" may be declared by the example as it stands."""
    more = ADAPTER.replace('"gate_baselines": ["window"],', '"gate_baselines": ["window"], "exceptions": True,')
    assert more != ADAPTER
    (folder / "exceptions_port.py").write_text(more, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    with few_runs():
        verdict = judge(load.load("exceptions_port:Port"))
    assert verdict.exit_status == 0
    assert verdict.declared == 7  # two came with SGD's momentum and float32, four are ATM's, one is RND-02


def test_the_table_of_capabilities_is_complete() -> None:
    table = PAGE.split("## 7.")[1].split("## 8.")[0]
    named = set(re.findall(r'`[^`]*?"(\w+)":', table)) | set(re.findall(r'"(\w+)": \[\.\.\., "cuda"\]', table))
    assert named == set(CAPABILITIES)
    values = {v for choices in CAPABILITIES.values() if choices is not bool for v in choices}
    assert {v for v in values if f'"{v}"' not in PAGE} == set()


def test_the_pytest_snippet_runs(folder: Path) -> None:
    (folder / "test_mine.py").write_text(TESTS, encoding="utf-8")
    done = in_folder(folder, "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout
    assert done.returncode == 0


def test_the_list_of_known_failures_is_one(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(next(text for kind, text in BLOCKS if kind == "toml"), encoding="utf-8")
    assert read_known(str(tmp_path / "known.toml"))["EXT-05"].dtypes == ("float32",)


def test_a_process_of_its_own_gives_the_same_verdict(folder: Path) -> None:
    """Section 9."""
    served = f"{sys.executable} -m gxpo_conformance.process.serve my_port:Port"
    done = in_folder(folder, "gxpo_conformance.cli", "--exec", served)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "44/44 MUST" in done.stdout
