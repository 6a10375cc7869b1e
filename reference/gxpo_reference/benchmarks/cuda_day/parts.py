"""What a day on a GPU consists of: parts, each a command with its time limit and what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gxpo
from gxpo_reference.benchmarks import growth, overhead
from gxpo_reference.benchmarks.models import SIZES, short

MODELS = (10**8, 3 * 10**8, 10**9)  # parameters
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of a number
MEMORY_KEPT = 12  # numbers per parameter at the peak of the memory benchmark: the textbook's
TOYS = ("bandit", "bandit100", "contextual", "steep", "sort3", "sort4", "add", "copy", "sort3-transformer")
TESTS = {  # part -> folder, and the one file that stands for it where it has to be quick
    "tests": ("tests", "test_step.py"),
    "tests-conformance": ("conformance/tests", "test_spec.py"),
    "tests-reference": ("reference/tests", "test_oracle_gate.py"),
    "tests-toys": ("toy_tasks/tests", "test_bandits.py"),
}


@dataclass(frozen=True)
class Part:
    name: str
    kind: str  # "environment", "tests", "conformance", "benchmark", "toy" or "trainer": how its outcome is read
    about: str
    command: tuple[str, ...]  # after the interpreter
    minutes: float  # it may take
    writes: Path  # its figures
    needs: tuple[str, ...] = ()  # packages
    checkout: bool = False  # needs the tests' files
    bytes: int = 0  # of the device's memory

    def missing(self) -> str:
        """What keeps it from being run here; empty where nothing does."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        return "the tests are in a checkout only" if self.checkout and checkout() is None else ""


def checkout() -> Path | None:
    """Where gxpo.py lies beside its tests."""
    root = Path(gxpo.__file__).resolve().parent
    return root if (root / "tests" / "test_on_cuda.py").exists() else None


def parts(folder: Path, device: str, quick: bool) -> list[Part]:
    """In the order in which they are run: what was never seen first, what takes long last."""
    return [*_first(folder, device, quick), *_benchmarks(folder, device, quick), *_others(folder, device, quick)]


def _tests(folder: Path, name: str, about: str, mark: str, files: list[str], minutes: float) -> Part:
    writes = folder / f"{name}.xml"
    command = ("-m", "pytest", "-m", mark, f"--junitxml={writes}", "-p", "no:cacheprovider", *files)
    return Part(name, "tests", about, command, minutes, writes, ("pytest", "hypothesis"), checkout=True)


def _first(folder: Path, device: str, quick: bool) -> Iterator[Part]:
    writes = folder / "environment.facts"
    module = "gxpo_reference.benchmarks.cuda_day.facts"
    yield Part("environment", "environment", "GPU, driver, versions", ("-m", module, device, str(writes)), 5, writes)
    everywhere = [where for where, _ in TESTS.values()]
    yield _tests(folder, "tests-cuda", "tests that need CUDA, of all packages", "cuda", everywhere, 20)
    writes = folder / "conformance.jsonl"
    command = ("-m", "gxpo_conformance.cli", "--device", device, "--json", str(writes))
    yield Part("conformance", "conformance", "gxpo.py under the whole suite", command, 60, writes)


def _benchmarks(folder: Path, device: str, quick: bool) -> Iterator[Part]:
    def benchmark(name: str, about: str, what: str, *options: str, minutes: float = 20, needed: int = 0) -> Part:
        writes = folder / f"{name}.figures"
        command = ("-m", "gxpo_reference.benchmarks", what, "--device", device, *options, "--out", str(writes))
        command += ("--quick",) if quick else ()
        command += ("--threads", "1") if device == "cpu" else ()  # two wait for each other on a busy machine
        return Part(name, "benchmark", about, command, minutes, writes, bytes=needed)

    for dtype in DTYPES:
        what = f"what GXPO adds to three plain steps, {dtype}"
        yield benchmark(f"overhead-{dtype}", what, "overhead", "--dtype", dtype)
    yield benchmark("steps", "whole steps of a transformer, every setting", "steps")
    yield benchmark("stages", "the stages of a step, pass by pass", "stages")
    if not quick:
        small = ("--sizes", "1e5", "1e6", "1e7")
        yield benchmark("growth-small", "steps and stages of small models", "growth", *small)
    for size in (10**5,) if quick else MODELS:
        for dtype, itemsize in DTYPES.items():
            which, of = ("--sizes", short(size), "--dtype", dtype), f"{short(size)} parameters, {dtype}"
            name = f"{short(size)}-{dtype}"
            numbers = {"growth": growth.NUMBERS_KEPT, "memory": MEMORY_KEPT, "overhead": overhead.NUMBERS_KEPT}
            needed = {what: kept * size * itemsize for what, kept in numbers.items()}
            width, layers = SIZES[size]
            shape = () if quick else ("--width", str(width), "--layers", str(layers))
            yield benchmark(
                f"growth-{name}",
                f"steps and stages of {of}",
                "growth",
                *which,
                *("--batch", "4", "--rounds", "5"),
                minutes=40,
                needed=needed["growth"],
            )
            about = f"peak memory of {of}"
            yield benchmark(f"memory-{name}", about, "memory", *shape, "--dtype", dtype, needed=needed["memory"])
            about = f"what GXPO adds to three plain steps of {of}"
            yield benchmark(f"overhead-{name}", about, "overhead", *which, needed=needed["overhead"])


def _others(folder: Path, device: str, quick: bool) -> Iterator[Part]:
    for task in ("bandit", "sort3") if quick else TOYS:
        name = f"toy-{task}"
        command = ("-m", "gxpo_toy_tasks.cli", "run", task, "--quick", "--device", device, "--out", str(folder / name))
        writes = folder / name / "results.json"
        yield Part(name, "toy", f"every rule on {task}", command, 15, writes, ("rich", "matplotlib"))
    writes, steps = folder / "trl.log", "2" if quick else "20"  # no more than its log
    command = ("-m", "gxpo_reference.trainers.trl_example", "--device", device, "--steps", steps)
    yield Part("trl", "trainer", "TRL's trainer on a tiny model", command, 15, writes, ("trl", "peft"))
    for name, (where, one) in TESTS.items():
        files = [f"{where}/{one}"] if quick else [where]
        yield _tests(folder, name, f"the tests in {where} that need no CUDA", "not cuda", files, 90)
