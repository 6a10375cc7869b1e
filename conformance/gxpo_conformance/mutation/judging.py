"""One mutant under the suite, and many of them, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.mutation.operators import Mutation, Subject
from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import AdapterError, Port
from gxpo_conformance.trial import FAIL, Result, Trial

CAUGHT, CRASHED, TIMED_OUT, NOT_LOADED = "caught", "crashed", "timed out", "did not load"
SURVIVED = "survived"
REQUEST_LIMIT = 10.0  # seconds for one request to a mutant
MUTANT_LIMIT = 600.0  # for all of one: a right port takes a twentieth of it
MOST_MEMORY = 8 * 2**30  # bytes of address space, so that a mutant that grows without end dies alone


def put(subject: Subject, folder: Path, mutation: Mutation | None) -> None:
    """The port's files in `folder`, a package of its own, with one line changed."""
    modules = "|".join(f.stem for f in subject.files)
    texts = {name: list(lines) for name, lines in subject.sources.items()}
    if mutation:
        lines, n = texts[mutation.file], mutation.number - 1
        lines[n] = lines[n][: len(lines[n]) - len(lines[n].lstrip())] + mutation.mutated + "\n"
    if subject.adapter:
        texts["adapter.py"] = [subject.adapter.read_text(encoding="utf-8")]
    for name, lines in texts.items():
        text = re.sub(rf"\bgxpo_reference\.({modules})\b", rf"{folder.name}.\1", "".join(lines))
        (folder / name).write_text(text, encoding="utf-8")


def opened(subject: Subject, folder: Path) -> Port:
    """AdapterError where it is no port."""
    if subject.command:
        command = subject.command.replace("gxpo_port.mjs", str(folder / "gxpo_port.mjs"))
        return load(command=command, time_limit=REQUEST_LIMIT)
    sys.path.insert(0, str(folder.parent))
    return load(f"{folder.name}.{'adapter' if subject.adapter else subject.files[0].stem}:Port")


def first_failure(port: Port, dtypes: Sequence[str], only: Sequence[str]) -> Result | None:
    """Fixed cases of all clauses, then awkward runs, in one dtype after the other, up to the first that fails."""
    numbers = [n for n in clauses() if not only or any(n.startswith(o) for o in only)]
    for dtype in dtypes:
        trial = Trial(port, [dtype], time_limit=REQUEST_LIMIT)
        for settle in (trial.fixed_cases, trial.settle):
            for number in numbers:
                settle(number)
                for results in (*trial.fixed.values(), *trial.verdict.results.values()):  # of what it leans on as well
                    for result in results.values():
                        if result.verdict == FAIL:
                            return result
    return None


def outcome(subject: Subject, empty: Path, mutation: Mutation | None, only: Sequence[str]) -> dict[str, Any]:
    """What comes of a mutant, of the original for None. `empty`: a folder for it."""
    folder = empty / re.sub(r"\W", "_", f"of_{empty.name}")  # a package's name, and no other's
    folder.mkdir()
    put(subject, folder, mutation)
    port: Any = None
    try:
        port = opened(subject, folder)
        failed = first_failure(port, subject.dtypes, only)
    except AdapterError as error:
        return {"outcome": NOT_LOADED, "why": str(error)}
    finally:
        if end := getattr(port, "end", None):  # of a process
            end()
    if failed is None or failed.finding is None:  # a failure has a finding
        return {"outcome": SURVIVED}
    kind = TIMED_OUT if failed.finding.timed_out else CRASHED if failed.finding.crash else CAUGHT
    return {"outcome": kind, "by": failed.clause.id, "dtype": failed.dtype, "run": failed.finding.run}


@dataclass
class Running:
    process: Any
    answer: connection.Connection
    mutation: Mutation
    folder: tempfile.TemporaryDirectory
    began: float = field(default_factory=time.monotonic)

    def result(self) -> dict[str, Any] | None:
        """None while it goes on."""
        if self.answer.poll():
            with contextlib.suppress(EOFError):
                return self.answer.recv()
            return {"outcome": CRASHED}  # it took its process with it
        if time.monotonic() - self.began > MUTANT_LIMIT:
            return {"outcome": TIMED_OUT}
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.answer.close()
        self.folder.cleanup()


def judged(
    subject: Subject, waiting: Sequence[Mutation], jobs: int, only: Sequence[str]
) -> Iterator[tuple[Mutation, dict[str, Any]]]:
    """Each mutant in a process that is forked from this one, where the cases have been made already."""
    context = multiprocessing.get_context("fork")
    left = list(reversed(waiting))
    running: list[Running] = []
    try:
        while left or running:
            while left and len(running) < jobs:
                mutation = left.pop()
                folder = tempfile.TemporaryDirectory(prefix="mutant_", ignore_cleanup_errors=True)
                mine, its = context.Pipe(duplex=False)
                arguments = (its, subject, Path(folder.name), mutation, only)
                process = context.Process(target=alone, args=arguments)
                with warnings.catch_warnings():  # of a fork with threads: numpy's own wait for work, and there is none
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                its.close()
                running.append(Running(process, mine, mutation, folder))
            connection.wait([r.answer for r in running], timeout=1.0)
            for r in list(running):
                if (found := r.result()) is not None:
                    running.remove(r)
                    r.end()
                    yield r.mutation, found
    finally:
        for r in running:
            r.end()


def alone(
    answer: connection.Connection, subject: Subject, folder: Path, mutation: Mutation, only: Sequence[str]
) -> None:
    """In the child."""
    if not subject.command:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a mutant warns of
    found = outcome(subject, folder, mutation, only)
    answer.send(found)
