"""The vectors: the suite's cases as files, for those who can run neither an adapter nor a process.

Five kinds, a file each: `scale` (r, K -> q), `ratio` (g0, g1, c0, c1 -> r, q), `step` (configuration, parameters,
gradients -> points asked, end), `gate` (configuration, observations -> z, active), `run` (an awkward run, in the form
of `step`). `step` and `gate` are the suite's fixed cases, as its checks play them; all are written by the oracle in
float64. An id stands for one case for good: a case whose input changes gets a new one, and the old one is retired.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from gxpo_conformance.clauses.table import SPEC_VERSION
from gxpo_conformance.harness.case import Case
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.vectors.cases import inputs, make, run_case
from gxpo_conformance.vectors.margins import fit_runs, margins, unfit

FOLDER = Path(str(resources.files("gxpo_conformance").joinpath("vectors")))


def load(kind: str) -> list[Case]:
    return read(kind)["cases"]


def read(kind: str) -> dict[str, Any]:
    """A file; one without cases where there is none yet."""
    path = FOLDER / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": [], "retired": []}


def text(kind: str, cases: list[Case], retired: list[str]) -> str:
    """A file: a case a line, so that a change shows as the lines it changes."""
    head = {"$schema": f"{kind}.schema.json", "kind": kind, "spec": SPEC_VERSION, "dtype": "float64"}
    lines = ",\n".join(json.dumps(case, separators=(",", ":"), allow_nan=False) for case in cases)
    return json.dumps({**head, "retired": retired})[:-1] + ', "cases": [\n' + lines + "\n]}\n"


def numbered(made: dict[str, list[Case]]) -> dict[str, tuple[list[Case], list[str]]]:
    """By kind (cases with their ids, retired ids): a case that a file has keeps its id, a new one gets the next number
    that no file has had."""
    files = {kind: read(kind) for kind in made}
    taken = {name for file in files.values() for name in (*(case["id"] for case in file["cases"]), *file["retired"])}
    return {kind: with_ids(kind, cases, files[kind], taken) for kind, cases in made.items()}


def with_ids(kind: str, cases: list[Case], file: dict[str, Any], taken: set[str]) -> tuple[list[Case], list[str]]:
    known = {inputs(kind, case): case["id"] for case in file["cases"]}
    made, kept = [], set()
    for case in cases:
        name = known.get(inputs(kind, case))
        if name is None:
            prefix = case["clause"] if kind in ("step", "gate") else f"{kind}/{case['clause']}"
            name = f"{prefix}/{max(numbers(prefix, taken), default=0) + 1}"
            taken.add(name)
        kept.add(name)
        made.append({"id": name, **case})
    return made, sorted({*file["retired"], *(set(known.values()) - kept)})


def numbers(prefix: str, ids: Iterable[str]) -> list[int]:
    return [int(found[1]) for name in ids if (found := re.fullmatch(rf"{re.escape(prefix)}/(\d+)", name))]


def write(folder: str) -> int:
    """Write every file into `folder`; 1 where a case is not fit to be one. AdapterError where it cannot be written."""
    made = make()
    wrong = [line for kind, cases in made.items() for line in margins(kind, cases)]
    made["run"], left_out = fit_runs()
    for kind, (cases, retired) in numbered(made).items():
        file = read(kind)
        new = {case["id"] for case in cases} - {case["id"] for case in file["cases"]}
        gone = set(retired) - set(file["retired"])
        less = f", {left_out} left out: no known mistake is ten tolerances off" if kind == "run" else ""
        print(f"{kind}: {len(cases)} cases, {len(new)} new, {len(gone)} retired{less}", flush=True)
        if not wrong:
            try:
                Path(folder, f"{kind}.json").write_text(text(kind, cases, retired), encoding="utf-8")
            except OSError as error:
                raise AdapterError(f"--write {folder}: {error}") from error
    for line in wrong:
        print(f"UNFIT  {line}")
    return 1 if wrong else 0


def check() -> int:
    """Compare the files with what the oracle gives, case by case; 1 where they differ."""
    made = make()  # and of the awkward runs those that the file has: which are fit to be there, `write` finds out
    made["run"] = [case for stored in load("run") if (case := run_case(stored["awkward"]))]
    total = 0
    for kind, (cases, retired) in numbered(made).items():
        file = read(kind)
        wrong = differences(cases, file["cases"]) + [f"{name} is not made any more" for name in retired]
        wrong = [line for line in wrong if line.split()[0] not in file["retired"]]
        wrong += [f"{case['id']}: margin {case['margin']}" for case in file["cases"] if unfit(case["margin"])]
        for line in wrong:
            print(f"{kind}: {line}")
        print(f"{kind}: {len(file['cases'])} cases, {len(wrong)} differ from the oracle")
        total += len(wrong)
    return 1 if total else 0


def differences(made: list[Case], files: list[Case]) -> list[str]:
    """A line for every case that the file lacks or has otherwise; numbers within a millionth of a millionth."""
    there = {case["id"]: case for case in files}
    wrong = []
    for case in made:
        if case["id"] not in there:
            wrong.append(f"{case['id']} is missing (vectors --write adds it)")
            continue
        stored = {k: v for k, v in there[case["id"]].items() if k not in ("margin", "nearest")}
        where = differs(case, stored)
        if where is not None:
            wrong.append(f"{case['id']}{where}")
    return wrong


def differs(one: Any, other: Any, where: str = "") -> str | None:
    """Where two trees of JSON part; None where they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where} has {sorted(one.keys() ^ other.keys())} on one side only"
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where} has {len(other)} entries, should be {len(one)}"
        pairs = [(a, b, f"{where}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float | int):
        # Tolerances are written with three digits, whose last may turn with the machine.
        near = 1e-2 if "tolerance" in where else 1e-12
        return None if math.isclose(one, other, rel_tol=near, abs_tol=1e-15) else f"{where} is {other}, should be {one}"
    else:
        return None if one == other else f"{where} is {other!r}, should be {one!r}"
    return next((found for pair in pairs if (found := differs(*pair)) is not None), None)
