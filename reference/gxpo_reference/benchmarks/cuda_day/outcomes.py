"""What a part that has ended says, from its exit status, its files and its log."""

from __future__ import annotations

import json
import math
import re
import signal
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""  # it failed
    does_not_fit: bool = False  # into the device's memory


def read(kind: str, written: Path, log: str, status: int) -> Outcome:
    """`status`: as subprocess has it, below 0 for a signal. A part that wrote nothing has failed, whatever it says."""
    try:
        outcome = READERS[kind](written, log)
    except (OSError, ValueError, KeyError, TypeError, IndexError, ET.ParseError) as error:
        outcome = Outcome(why="" if status else f"no figures: {type(error).__name__}: {error}")
    if status and not outcome.why:
        outcome.why = ended(status, log)
    if kind == "benchmark" and status and re.search(r"OutOfMemoryError|CUDA out of memory", log):
        return Outcome(why="out of memory", does_not_fit=True)
    return outcome


def ended(status: int, log: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"exit status {status}" + (f": {lines[-1][:200]}" if lines else "")


def first_line(text: str | None) -> str:
    return next(iter((text or "").splitlines()), "")[:200]


def tests(written: Path, log: str) -> Outcome:
    """pytest's JUnit file."""
    passed, skipped, failed = 0, Counter[str](), []
    for case in ET.parse(written).getroot().iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skip = case.find("skipped")
        if problem is not None:
            failed.append({"what": name, "message": first_line(problem.get("message"))})
        elif skip is not None:
            reason = skip.get("message") or "no reason given"
            if reason == "collection skipped":  # a whole file: (path, line, reason), as text
                reason = f"{name}: {(skip.text or '').rsplit('Skipped: ', 1)[-1].rstrip(')')}".replace("'", "")
            skipped[reason] += 1
        else:
            passed += 1
    figures = {"passed": passed, "failed": failed, "skipped": dict(skipped.most_common())}
    if failed:
        return Outcome(figures, f"{len(failed)} of {passed + len(failed)} tests failed")
    return Outcome(figures, "" if passed or skipped else "no tests were found")


def conformance(written: Path, log: str) -> Outcome:
    """The suite's JSON lines."""
    head, *results, foot = (json.loads(line) for line in written.read_text(encoding="utf-8").splitlines())
    counts: dict[str, Counter[str]] = {dtype: Counter() for dtype in head["dtypes"]}
    for result in results:
        if result["dtype"] in counts:
            counts[result["dtype"]][result["verdict"]] += 1
    failed = [
        {"what": f"{r['clause']}, {r['dtype']}", "message": first_line(r["message"])}
        for r in results
        if r["verdict"] in ("fail", "error")
    ]
    figures = {key: foot[key] for key in ("headline", "words")}
    figures |= {"counts": {dtype: dict(count) for dtype, count in counts.items()}, "failed": failed}
    return Outcome(figures, "" if foot["exit_status"] == 0 else foot["words"])


def skips(tree: Any) -> Iterator[str]:
    """What a benchmark says of the sizes that it skipped."""
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if isinstance(branch, dict) and "skipped" in branch:
            yield branch["skipped"]
        else:
            yield from skips(branch)


def numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(branch)
    elif isinstance(tree, float):
        yield tree


def benchmark(written: Path, log: str) -> Outcome:
    """What --out holds. Nothing but skipped sizes is a part left out."""
    record = json.loads(written.read_text(encoding="utf-8"))
    results = record["results"]
    figures = {"config": record["config"], "results": results}
    rows = [row for rows in results.values() if isinstance(rows, list) for row in rows]
    if rows and all("skipped" in row for row in rows):
        return Outcome(figures, next(skips(results)).removeprefix("skipped: "), does_not_fit=True)
    odd = not all(math.isfinite(number) for number in numbers(results))
    return Outcome(figures, "figures that are not finite" if odd else "")


def toy(written: Path, log: str) -> Outcome:
    """Accuracies at the end: medians over the seeds, at the one rate that all rules have."""
    cells = json.loads(written.read_text(encoding="utf-8"))["cells"]
    ends = {
        name.removeprefix("same/"): statistics.median(curve[-1] for curve in cell["accuracy"])
        for name, cell in cells.items()
        if name.startswith("same/")
    }
    odd = [name for name, end in ends.items() if not 0 <= end <= 1]
    return Outcome({"accuracy": ends}, f"no accuracy: {', '.join(odd) or 'no rules'}" if odd or not ends else "")


def trainer(written: Path, log: str) -> Outcome:
    """The example's last lines."""
    return Outcome({"said": [line for line in log.splitlines() if "passes" in line or "moves about" in line][-2:]})


def environment(written: Path, log: str) -> Outcome:
    return Outcome(json.loads(written.read_text(encoding="utf-8")))


READERS: dict[str, Callable[[Path, str], Outcome]] = {
    "environment": environment,
    "tests": tests,
    "conformance": conformance,
    "benchmark": benchmark,
    "toy": toy,
    "trainer": trainer,
}
