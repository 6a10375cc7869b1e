"""Runs gxpo.py's own check, the conformance suite and the tests on releases of torch, each in a fresh environment."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_suffix(".md")
VERSIONS = ["2.4.1", "2.5.1", "2.6.0", "2.7.1", "2.9.1", "2.13.0", "2.14.1"]
WITH_TRAINERS = (2, 13)  # the first torch that TRL, accelerate and Lightning are tried with
HEAD = """\
# Releases of torch

Written by `python .ci/torch_versions.py VERSION ...`, which replaces the rows of the versions it is given and keeps
the others. A row is one run in a fresh environment, on a CPU. A skipped test is not a passed one: why each was skipped
stands below the table. Before torch 2.13 no trainers (TRL, accelerate, Lightning, schedule-free) are installed.

| torch | Python | date | `python gxpo.py` | `gxpo-conformance` | passed | failed | skipped |
|---|---|---|---|---|---|---|---|
"""
EPILOG = """\
PyPI's wheels of torch for Linux are builds for CUDA: a release is a download of 2 to 3 GB and takes 5 to 7 GB of disk
while it is tried. torch's installation page names an index of smaller ones, without CUDA: --pip-args="--extra-index-url
URL" (not tried here). Environments are made one after the other, and deleted. A release takes 10 to 30 minutes on two
cores. An old one has no wheels for a newer Python (2.4.1 ends at 3.12): choose another with --python. The exit status
is 0 where everything passed on every version, else 1.
"""


class Problem(Exception):
    """What stops a version, in one line."""


@dataclass
class Done:
    """A command that has ended, or was ended."""

    status: int | None  # None: it did not end in time
    output: str

    def last_line(self) -> str:
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


@dataclass
class Result:
    """A row of the page, and what stands below the table about it."""

    version: str
    python: str
    check: str = ""
    suite: str = ""
    counts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(("passed", "failed", "skipped"), "not run"))
    notes: list[str] = field(default_factory=list)
    good: bool = False

    def row(self) -> str:
        cells = [self.version, self.python, datetime.date.today().isoformat(), self.check, self.suite]
        return "| " + " | ".join(cell.replace("|", "/") for cell in [*cells, *self.counts.values()]) + " |"


def say(text: str) -> None:
    print(text, flush=True)


def one_line(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Environment:
    """A virtual environment in a temporary folder, and commands run in it, from the checkout."""

    def __init__(self, version: str, folder: Path) -> None:
        self.version, self.folder = version, folder
        self.programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
        self.variables = {
            **plain,
            "PATH": f"{self.programs}{os.pathsep}{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": str(folder / "venv"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        }

    def run(self, stage: str, command: list[str], minutes: float) -> Done:
        """All it prints goes to a file of the stage's name; it and its children are ended after so many minutes."""
        log = self.folder / f"{stage.replace(' ', '-')}.log"
        say(f"[{self.version}] {stage} ...")
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout=60 * minutes)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end(process)
        done = Done(status, log.read_text(encoding="utf-8", errors="replace"))
        how = {None: f"not ended after {minutes:g} minutes", 0: "done"}.get(status, f"exit status {status}")
        say(f"[{self.version}] {stage}: {how}, {time.monotonic() - began:.0f} s")
        return done

    def python(self, stage: str, arguments: list[str], minutes: float) -> Done:
        return self.run(stage, [str(self.programs / "python"), *arguments], minutes)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it has started: a rank that hangs would outlive the test that waits for it."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


# ----------------------------------------------------------------------------------------------------------- installing


def why(done: Done) -> str:
    """pip's own reason, of many lines the one that says it."""
    if done.status is None:
        return "pip did not end in time"
    errors = [line for line in done.output.splitlines() if line.startswith("ERROR:")]
    return one_line(errors[0].removeprefix("ERROR:") if errors else done.last_line())


def in_the_way(output: str, pins: list[str]) -> list[str]:
    """The pins that pip names in its errors: this Python has no such wheel, or this torch forbids it."""
    lines = [line for line in output.splitlines() if line.startswith(("ERROR:", "    ")) or "(constraint)" in line]
    named = {name.lower() for line in lines for name in re.findall(r"([\w.-]+)==", line)}
    return [pin for pin in pins if pin.split("==")[0].lower() in named]


def install(env: Environment, stage: str, what: list[str], pins: list[str], pip_args: list[str]) -> list[str]:
    """By constraints.txt, with this torch in place of its own. Pins that cannot be are left out, and returned."""
    left_out: list[str] = []
    while True:
        kept = [pin for pin in pins if pin not in left_out]
        constraints = env.folder / "constraints.txt"
        this_torch = [] if stage == "torch" else [f"torch=={env.version}"]
        constraints.write_text("\n".join([*this_torch, *kept]) + "\n", encoding="utf-8")
        command = ["-m", "pip", "install", "--progress-bar", "off", "-c", str(constraints), *pip_args, *what]
        done = env.python(stage, command, minutes=60)
        if done.status == 0:
            return left_out
        more = in_the_way(done.output, kept) if done.status else []
        if not more:
            hint = " (are there wheels of it for this Python? --python chooses another)" if stage == "torch" else ""
            raise Problem(f"{stage}: {why(done)}{hint}")
        say(f"[{env.version}] {stage}: without {', '.join(more)}")
        left_out += more


def pinned() -> list[str]:
    """constraints.txt, all but torch."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line and not re.match(r"torch\s*==", line)]


# ---------------------------------------------------------------------------------------------------------- the results


def read_junit(path: Path, result: Result) -> bool:
    """Counts, names of failed tests, reasons of skipped ones; False where pytest has left no file."""
    try:
        cases = list(ET.parse(path).iter("testcase"))
    except (OSError, ET.ParseError):
        return False
    failed, skipped, passed = set(), Counter[str](), 0
    for case in cases:
        name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
        elif skip is not None:
            # Of a module that is skipped as a whole, the message has no reason.
            of_a_module = re.search(r"['\"]Skipped: (.*)['\"]\)$", skip.text or "")
            reason = of_a_module[1] if of_a_module else skip.get("message") or "no reason"
            skipped[re.sub(r"\+\w+", "", one_line(reason))] += 1
        else:
            passed += 1
    result.counts = {"passed": str(passed), "failed": str(len(failed)), "skipped": str(sum(skipped.values()))}
    result.notes += [f"failed: `{name}`" for name in sorted(failed)]
    result.notes += [f"skipped, {count}: {reason}" for reason, count in sorted(skipped.items())]
    return True


def tried(version: str, python: str, release: str, folder: Path, pip_args: list[str], minutes: float) -> Result:
    """One version, from nothing to its row. Raises Problem where it could not be installed."""
    env = Environment(version, folder)
    made = env.run("venv", [python, "-m", "venv", str(folder / "venv")], minutes=5)
    if made.status != 0:
        raise Problem(f"venv: {one_line(made.last_line())}")
    pins = pinned()
    left_out = install(env, "torch", [f"torch=={version}"], pins, pip_args)
    left_out += install(env, "project", ["-e", ".[test]", "pytest-xdist"], pins, pip_args)
    result = Result(version, release)
    if by_number(version) >= WITH_TRAINERS:
        try:
            left_out += install(env, "trainers", ["-e", ".[trainers]"], pins, pip_args)
        except Problem as problem:
            result.notes.append(f"without trainers: {problem}")
    result.notes += [f"not as pinned in constraints.txt: `{pin}`" for pin in dict.fromkeys(left_out)]

    check = env.python("self-check", ["gxpo.py"], minutes=10)
    result.check = "hangs" if check.status is None else one_line(check.last_line())
    suite = env.run("suite", [str(env.programs / "gxpo-conformance")], minutes=20)
    headline = re.search(r"^GXPO [\d.]+: (.*)$", suite.output, re.M)
    result.suite = "hangs" if suite.status is None else headline[1] if headline else one_line(suite.last_line())
    junit = folder / "junit.xml"
    xdist = ["-n", "2", "-p", "no:cacheprovider", f"--junitxml={junit}", "-o", "junit_family=xunit1"]
    tests = env.python("tests", ["-m", "pytest", *xdist], minutes)
    if tests.status is None:
        result.notes.append(f"tests: not ended after {minutes:g} minutes")
    if not read_junit(junit, result) and tests.status is not None:
        result.notes.append(f"tests: {one_line(tests.last_line())}")
    for name, done in (("`python gxpo.py`", check), ("`gxpo-conformance`", suite)):
        if done.status:
            result.notes.append(f"{name} ended with exit status {done.status}: {one_line(done.last_line())}")
    result.good = check.status == suite.status == tests.status == 0
    return result


# ------------------------------------------------------------------------------------------------------------- the page


def by_number(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def write(result: Result) -> None:
    """The page with this result in it, and all others as they were."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    table, *sections = re.split(r"^## torch ", page, flags=re.M)
    rows = {row.split("|")[1].strip(): row for row in re.findall(r"^\| \d.*$", table, re.M)}
    notes = {section.split("\n")[0].strip(): section.split("\n", 1)[1].strip() for section in sections}
    rows[result.version] = result.row()
    notes[result.version] = "\n".join(f"- {note}" for note in result.notes)
    order = sorted(rows, key=by_number)
    parts = [HEAD + "\n".join(rows[version] for version in order)]
    parts += [f"## torch {version}\n\n{notes[version]}" for version in order if notes.get(version)]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the command


def refuse(text: str) -> NoReturn:
    print(f"torch_versions.py: {text}", file=sys.stderr)
    raise SystemExit(2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nResults go to {PAGE.relative_to(ROOT)}, a row a version; other rows are kept.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", default=VERSIONS, help=f"default: {' '.join(VERSIONS)}"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter of the environments; default: the one that runs this"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments, and say where they are")
    parser.add_argument("--pip-args", default="", metavar="ARGS", help="more arguments for pip, in one string")
    parser.add_argument(
        "--minutes", type=float, default=60, help="the tests' time limit; default: 60. Tests that hang are a result"
    )
    given = parser.parse_args()
    for version in given.versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            refuse(f"not a release of torch: {version!r} (one is 2.7.1)")
    try:
        given.pip_args = shlex.split(given.pip_args)
    except ValueError as error:
        refuse(f"--pip-args: {error}")
    if not (found := shutil.which(given.python)):
        refuse(f"--python: there is no program {given.python}")
    asked = [found, "-c", "import platform, venv; print(platform.python_version())"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode or by_number(answer.stdout) < (3, 10):
        refuse(f"--python: {given.python} is not a Python 3.10 or newer with venv")
    given.python, given.release = found, answer.stdout.strip()
    return given


def main() -> int:
    given = arguments()
    if not PAGE.exists():
        PAGE.write_text(HEAD, encoding="utf-8")  # the tests want to see it: README leads there
    good = True
    for version in given.versions:
        folder = Path(tempfile.mkdtemp(prefix=f"torch-{version}-"))
        fine = False
        try:
            result = tried(version, given.python, given.release, folder, given.pip_args, given.minutes)
            write(result)
            fine = result.good
            say(f"[{version}] {result.row()}")
        except Problem as problem:
            say(f"[{version}] {problem}")
        except KeyboardInterrupt:
            say(f"[{version}] interrupted; results of the versions before it are in {PAGE}")
            return 130
        finally:
            if not given.keep:
                shutil.rmtree(folder / "venv", ignore_errors=True)
            if given.keep or not fine:
                say(f"[{version}] kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        good = good and fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
