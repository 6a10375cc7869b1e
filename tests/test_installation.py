"""What people install: a clone or a wheel works from wherever they stand, holds what it needs, and is never written to.

Nothing is downloaded: the environments made here borrow the dependencies of the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from project_files import ROOT, files_of_the_project

PACKAGES = ("conformance/gxpo_conformance", "reference/gxpo_reference", "toy_tasks/gxpo_toy_tasks")
# Without torch, and without what only the toy tasks or the tests use. jinja2 needs markupsafe.
LIGHT = ("numpy", "jinja2", "markupsafe", "tomli")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the project in it."""

    folder: Path

    @property
    def programs(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def site_packages(self) -> Path:
        return next(self.folder.rglob("site-packages"))

    def run(self, *command: str, at: Path) -> subprocess.CompletedProcess[str]:
        """`command`, a program of this environment, from the folder `at`."""
        # Not PYTHONPATH, nor what pytest or a CI sets for Python: as in a shell that has just been opened.
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COVERAGE"))}
        program = shutil.which(command[0], path=str(self.programs)) or command[0]
        return subprocess.run(
            [program, *command[1:]], cwd=at, env=plain, capture_output=True, text=True, check=False, timeout=300
        )


def made(folder: Path, borrowed: Path) -> Environment:
    """An empty environment that sees the packages in `borrowed`, after its own."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    environment = Environment(folder)
    (environment.site_packages / "zz_borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return environment


def pip(environment: Environment, *arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--python", str(environment.folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone called gxpo in it, as most people have one."""
    folder = tmp_path_factory.mktemp("one-folder-up")
    for name in files_of_the_project():
        target = folder / "gxpo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return folder


@pytest.fixture(scope="session")
def built(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=here / "gxpo", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def installed(here: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """An environment with the project "editable" or "plain", made once."""
    environments: dict[str, Environment] = {}
    everything = Path(metadata.distribution("numpy").locate_file("")).resolve()

    def environment(how: str) -> Environment:
        if how not in environments:
            environments[how] = made(tmp_path_factory.mktemp(how) / "venv", everything)
            what = ["-e", str(here / "gxpo")] if how == "editable" else [str(next(built.glob("*.whl")))]
            pip(environments[how], "install", *OFFLINE, *what)
        return environments[how]

    return environment


# ------------------------------------------------------------------------------------------------ from wherever one is


@pytest.mark.parametrize("place", ["one folder up", "elsewhere", "in the clone"])
@pytest.mark.parametrize("how", ["editable", "plain"])
def test_it_works_from_wherever_one_stands(
    how: str, place: str, here: Path, installed: Callable[[str], Environment], tmp_path: Path
) -> None:
    """A folder called gxpo beside a script would be taken for the package, and the first import would fail."""
    environment = installed(how)
    at = {"one folder up": here, "elsewhere": tmp_path, "in the clone": here / "gxpo"}[place]
    script = at / "uses_gxpo.py"
    script.write_text("from gxpo import GXPO\nprint(GXPO.__name__)\n", encoding="utf-8")
    for command, says in (
        (["python", str(script)], "GXPO"),  # its folder comes first on the path
        (["python", "-c", "from gxpo import GXPO; print(GXPO.__name__)"], "GXPO"),
        (["gxpo-conformance", "smoke"], "adapter and method answer"),
        (["gxpo-toys", "list"], "contextual"),
        (["python", "-m", "gxpo_toy_tasks.hunt", "--help"], "TABLE"),
    ):
        done = environment.run(*command, at=at)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert says in done.stdout
        assert done.stderr == ""
    script.unlink()


def test_an_editable_install_is_a_path_that_any_tool_can_follow(
    here: Path, installed: Callable[[str], Environment]
) -> None:
    """An import hook in its place leaves editors and type checkers in the dark."""
    lines = (installed("editable").site_packages / "_gxpo.pth").read_text(encoding="utf-8").split()
    clone = (here / "gxpo").resolve()
    assert [Path(line).resolve() for line in lines] == [clone, *(clone / p.split("/")[0] for p in PACKAGES)]


# ------------------------------------------------------------------------------------------------- what is handed out


def in_the_packages() -> set[str]:
    """Files as they have to be installed."""
    kept = {name: name.split("/", 1)[1] for name in files_of_the_project() if name.startswith(PACKAGES)}
    return {"gxpo.py", *kept.values()}


def test_the_wheel_holds_the_file_and_the_packages_with_their_data(built: Path) -> None:
    """A schema, a vector or a page that is missing shows first at a user's, and a generic name there hides another."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {n for n in names if ".dist-info/" not in n} == in_the_packages()
    tops = {p.split("/")[1] for p in PACKAGES}
    assert {n.split("/")[0] for n in names} == {"gxpo.py", *tops, f"gxpo-{metadata.version('gxpo')}.dist-info"}
    assert {f"{top}/py.typed" for top in tops} <= names


def test_the_sdist_is_the_project(built: Path) -> None:
    """Who packages it for a distribution builds and tests from it."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert set(files_of_the_project()) - names <= {".gitignore"}


# -------------------------------------------------------------------------------------------------------- without torch


@pytest.fixture(scope="session")
def light(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The project with numpy and jinja2, as somebody has it who ports GXPO to JAX or Rust."""
    borrowed = tmp_path_factory.mktemp("light") / "packages"
    borrowed.mkdir()
    belongs = re.compile(rf"({'|'.join(LIGHT)})(\.libs|-.*\.dist-info)?", re.IGNORECASE)
    for path in Path(metadata.distribution("numpy").locate_file("")).resolve().iterdir():
        if belongs.fullmatch(path.name) and os.name == "nt":  # links are an administrator's there
            shutil.copytree(path, borrowed / path.name)
        elif belongs.fullmatch(path.name):
            (borrowed / path.name).symlink_to(path)
    environment = made(borrowed.parent / "venv", borrowed)
    pip(environment, "install", *OFFLINE, str(next(built.glob("*.whl"))))
    return environment


def test_the_suite_needs_numpy_and_no_torch(light: Environment, tmp_path: Path) -> None:
    """A porter to JAX or Rust would have to install gigabytes to be judged."""
    pip(light, "check", "--disable-pip-version-check")  # fails where something is wanted that is not there
    assert light.run("python", "-c", "import torch", at=tmp_path).returncode != 0
    oracle = ["--impl", "gxpo_conformance.adapters.oracle:Port"]
    reports = ["--json", "a.jsonl", "--junit", "b.xml", "--html", "c.html", "--badge", "d.json"]
    done = light.run("gxpo-conformance", *oracle, *reports, at=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: conformant" in done.stdout
    served = "python -m gxpo_conformance.process.serve gxpo_conformance.adapters.oracle:Port"
    done = light.run("gxpo-conformance", "--exec", str(light.programs / served), "--only", "EXT", at=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    for command in (["list"], ["smoke", *oracle], ["repro", "MOV-02", *oracle]):
        assert light.run("gxpo-conformance", *command, at=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["python", "-c", "import gxpo"], "gxpo.py needs torch: pip install torch"),
        (["gxpo-conformance"], "which is judged then, needs torch: name your port by --impl"),
        (["gxpo-toys", "list"], 'pip install "gxpo[toys]"'),
        (["python", "-m", "gxpo_toy_tasks.hunt"], "gxpo_toy_tasks.hunt needs torch: pip install torch"),
        (["python", "-m", "gxpo_reference.benchmarks"], "gxpo_reference.benchmarks needs torch: pip install torch"),
        (["python", "-m", "gxpo_reference.trainers.trl_example"], 'pip install "gxpo[trl]"'),
        (["python", "-m", "gxpo_conformance.figures", "speed"], "needs torch: name your port by --impl"),
    ],
)
def test_what_needs_torch_says_so_in_a_sentence(
    command: list[str], says: str, light: Environment, tmp_path: Path
) -> None:
    done = light.run(*command, at=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr.splitlines()[-1]
    assert "-c" in command or len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="the action's steps are for bash")
@pytest.mark.parametrize(
    ("inputs", "status", "says"),
    [
        (
            {"IMPL": "gxpo_conformance.adapters.oracle:Port", "OPTIONS": "--dtype float64 --only EXT,MOV"},
            3,
            "incomplete",
        ),
        ({"COMMAND": "python -m gxpo_conformance.process.serve my_port:Port", "OPTIONS": "--only MOV-02"}, 1, "MOV-02"),
        ({}, 2, "no port is named"),
    ],
)
def test_the_action_judges_a_port(
    inputs: dict[str, str], status: int, says: str, light: Environment, tmp_path: Path
) -> None:
    """It runs in other people's CI, where nobody of us sees it fail."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    assert [step["shell"] for step in steps] == ["bash", "bash"]
    wrong = "from gxpo_conformance.mutants import MUTANTS\n\nPort = MUTANTS['alpha-on-excess'].port\n"
    (tmp_path / "my_port.py").write_text(wrong, encoding="utf-8")
    given = dict.fromkeys(steps[1]["env"], "") | inputs
    path = f"{light.programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[1]["run"]],  # as GitHub runs it
        cwd=tmp_path, env={**given, "PATH": path}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert (tmp_path / "gxpo-conformance.html").exists() == (status != 2)
    assert (tmp_path / "gxpo-conformance.xml").exists() == (status != 2)


# ---------------------------------------------------------------------------------------------------- never written to

TINY_HUNT = """
from gxpo_toy_tasks import hunt
tried = {"GRPO": hunt.OTHERS["GRPO"], "GXPO": hunt.gxpo(5, 0.8)}
hunt.SEARCHES = {name: hunt.Search("bandit", "adamw", (0.05,), 6, tried) for name in hunt.SEARCHES}
hunt.main(["steep-sgd"])
"""


def test_commands_write_where_the_user_stands(installed: Callable[[str], Environment], tmp_path: Path) -> None:
    """An installation may be read-only, or another user's; and what somebody measured is not the package's."""
    environment = installed("plain")

    def contents() -> dict[str, tuple[int, int]]:
        files = [p for p in environment.site_packages.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before = contents()
    (tmp_path / "vectors").mkdir()
    oracle = ["--impl", "gxpo_conformance.adapters.oracle:Port"]
    for command in (
        ["python", "-c", TINY_HUNT],
        ["gxpo-conformance", "vectors", "--write", "vectors"],
        ["gxpo-conformance", "repro", "MOV-02", *oracle, "--case", "case.json"],
        ["gxpo-toys", "run", "bandit", "--quick"],
        ["gxpo-toys", "animate", "quadratics"],
    ):
        done = environment.run(*command, at=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert contents() == before
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| GXPO | 0.05 |" in page.split("<!-- steep-sgd -->")[1].split("<!-- end of steep-sgd -->")[0]
    assert {p.stem for p in (tmp_path / "vectors").iterdir()} == {"scale", "ratio", "step", "gate", "run"}
    assert json.loads((tmp_path / "gxpo-toys-bandit" / "results.json").read_text(encoding="utf-8"))["cells"]
    assert (tmp_path / "quadratics.gif").exists()
