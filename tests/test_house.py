"""The rules of the house: where things stand, who may import whom, and that pages and files agree with each other."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from project_files import ROOT, files_of_the_project

import gxpo

PACKAGES = {  # package -> where it lies, the lowest first: each may import those before it
    "gxpo": ROOT,
    "gxpo_reference": ROOT / "reference",
    "gxpo_toy_tasks": ROOT / "toy_tasks",
    "gxpo_conformance": ROOT / "conformance",
}
TESTS = [ROOT / "tests", *(folder / "tests" for name, folder in PACKAGES.items() if name != "gxpo")]
PAGES = sorted(ROOT / name for name in files_of_the_project() if name.endswith(".md"))


def modules() -> dict[str, Path]:
    """Name -> file, of everything that is installed."""
    found = {"gxpo": ROOT / "gxpo.py"}
    for name, folder in list(PACKAGES.items())[1:]:
        for path in sorted((folder / name).rglob("*.py")):
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[dotted.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package: str) -> None:
    """A port's author who reads the oracle would have to know the suite; gxpo.py is copied alone."""
    allowed = list(PACKAGES)[: list(PACKAGES).index(package) + 1]
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            above = {i for i in imported(path) if i.split(".")[0] not in allowed}
            assert not above, f"{name} imports {above}"


def test_no_modules_import_each_other() -> None:
    """In a circle nothing can be read first, and one import moved breaks all."""
    graph = {name: imported(path) - {name} for name, path in MODULES.items() if not path.name.startswith("__init__")}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_installed_imports_no_tests() -> None:
    names = {path.stem for folder in TESTS for path in folder.glob("*.py")}
    assert not names & {module.rsplit(".", 1)[-1] for module in MODULES} - {"conftest"}
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"^\s*(from|import) ({'|'.join(sorted(names))}|tests)\b", text, re.M), name


def test_test_files_have_names_of_their_own() -> None:
    """pytest would take one for the other."""
    names = [path.name for folder in TESTS for path in folder.glob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_a_file_of_over_400_lines_is_two_files() -> None:
    files = [p for p in MODULES.values() if p.name != "gxpo.py"]
    files += [p for folder in TESTS for p in folder.glob("*.py")]
    files += [p for folder in PACKAGES.values() for kind in ("*.mjs", "*.jinja") for p in folder.rglob(kind)]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_a_module_opens_with_a_sentence() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name} does not say what it is for"


@pytest.mark.parametrize("folder", ["conformance", "reference", "toy_tasks", "tests"])
def test_a_folder_opens_with_a_page_of_a_few_lines(folder: str) -> None:
    assert 5 < len((ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()) < 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_paths_on_the_pages_exist() -> None:
    """`reference/...` in a sentence is where somebody goes to look."""
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            for path in re.findall(
                r"`((?:conformance|reference|toy_tasks|tests|\.ci)/[\w./-]*)`", page.read_text("utf-8")
            ):
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_files_that_the_workflows_name_exist() -> None:
    """Nobody here runs them, so that nobody here would see it."""
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        named = re.findall(r"[\w/.-]+/[\w-]+\.py\b|\.ci/\w+", workflow.read_text(encoding="utf-8"))
        assert [name for name in named if not (ROOT / name).exists()] == [], workflow.name


def test_versions_agree() -> None:
    """A citation, a changelog and a hook of other versions than the file's would each be wrong by themselves."""
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {gxpo.__version__}\n" in cff
    assert f"\n## {gxpo.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"gxpo@v{gxpo.__version__}" in (ROOT / "README.md").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{pinned['ruff']}\n" in hooks
    assert {"ruff", "mypy", "pyright", "hatchling", "torch"} <= pinned.keys()
