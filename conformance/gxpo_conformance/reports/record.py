"""A run as records: what --json writes, a line each, and what every other report is made from.

The first record is a header, then one a clause and dtype, then a footer with the counts, so that a file that was cut
off cannot look whole.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import platform
import re
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

import numpy as np

from gxpo_conformance.clauses.table import GROUPS, SPEC_VERSION, clauses
from gxpo_conformance.mutants.nearest import Nearest
from gxpo_conformance.reports.causes import FLOAT32, Record, causes, hint, single_precision
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, NOT_RUN, PASS, VERDICTS, Result, Verdict
from gxpo_conformance.wire import number

FORMAT = 1  # of these records; a field may be added, none changes its meaning

MOST = 4000  # characters of one text; a port may say a megabyte, and three dtypes say it again
MOST_ON_A_LINE = 300
MOST_NAME = 120

# All but what XML 1.0 allows: control characters, lone surrogates. Of what it allows, also the C1 controls, and the
# marks that turn the direction of writing, by which a text can be made to look like another.
UNFIT = re.compile("[^\t\n -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def legible(text: str, most: int = MOST) -> str:
    """`text` with a mark for every character unfit for a report, its middle left out where it is longer than `most`."""
    if len(text) > most:
        head, tail = text[: 3 * most // 4], text[-(most // 4) :]
        text = f"{head}\n[... {len(text) - len(head) - len(tail):,} characters left out ...]\n{tail}"
    return UNFIT.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def on_a_line(text: str, most: int = MOST_ON_A_LINE) -> str:
    return " ".join(legible(text, most).split())


def fit(value: Any) -> Any:
    """A record with every text in it legible: here, once, so that no report has to think of what a port may say."""
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, dict):
        return {k: fit(v) for k, v in value.items()}
    return [fit(v) for v in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """What a verdict depends on besides the port."""
    return {
        "spec": SPEC_VERSION,
        "suite": metadata.version("gxpo"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def vectors_sha256() -> dict[str, str]:
    """SHA-256 of every file of vectors, by name."""
    folder = resources.files("gxpo_conformance").joinpath("vectors")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def records(
    verdict: Verdict, command: str, seconds: float, nearest: Nearest | None = None, only: Sequence[str] = ()
) -> list[Record]:
    """The whole run. `command` as it was given, `nearest` to look up known mistakes, `only` the clauses and groups that
    were asked for, empty for all."""
    made = [{**header(verdict, command), "only": list(only)}]
    for clause in clauses().values():
        results = verdict.results.get(clause.id)
        if results == {}:  # looked at, and none of the dtypes can show it
            made.append({**about(clause.id), "dtype": None, "verdict": NOT_RUN, "message": "no dtype of this run"})
        made += [result(r, verdict, command) for r in (results or {}).values()]
    explain(made[1:], verdict, nearest)
    return [fit(r) for r in (*made, footer(verdict, made[1:], seconds))]


def header(verdict: Verdict, command: str) -> Record:
    return {
        "record": "header",
        "format": FORMAT,
        "versions": versions(),
        "vectors_sha256": vectors_sha256(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "port": on_a_line(verdict.port, MOST_NAME),
        "device": verdict.device,
        "dtypes": verdict.dtypes,
        "seed": verdict.seed,
        "capabilities": verdict.capabilities,
        "command": command,
    }


def about(clause: str) -> Record:
    found = clauses()[clause]
    return {
        "record": "result",
        "clause": clause,
        "group": GROUPS[clause[:3]],
        "level": found.level,
        "needs": list(found.needs),
        "rule": found.rule,
    }


def result(r: Result, verdict: Verdict, command: str) -> Record:
    """One clause in one dtype; what a verdict does not have is left out."""
    made = {
        **about(r.clause.id),
        "dtype": r.dtype,
        "verdict": r.verdict,
        "message": r.message,
        "seconds": round(r.seconds, 4),
    }
    if r.known:
        made["known"] = dataclasses.asdict(r.known)
    if r.finding:
        finding = dataclasses.asdict(r.finding)
        made["finding"] = {k: number(v) if isinstance(v, float) else v for k, v in finding.items() if v is not None}
        made["rerun"] = rerun(r, verdict, command)
        if r.finding.run:
            made["run"] = r.finding.run
        made["case"] = r.case()
    return made


def explain(results: list[Record], verdict: Verdict, nearest: Nearest | None) -> None:
    """Adds to what failed the known mistakes that account for it, else what the failure itself gives away."""
    float32 = single_precision(verdict)
    for r in results:
        if r["verdict"] != FAIL:
            continue
        found = verdict.results[r["clause"]][r["dtype"]]
        if nearest and (guess := nearest.of(found)):
            r["candidates"] = [
                {"how": guess.how, "id": m.id, "does": m.does, "source": m.source} for m in guess.mutants
            ]
            if len(guess.mutants) == 1:
                r["nearest"] = r["candidates"][0]
        if said := hint(found):
            r["hint"] = said
        elif r["clause"] in float32 and r["dtype"] == "float64" and "candidates" not in r:
            r["hint"] = FLOAT32


def rerun(r: Result, verdict: Verdict, command: str) -> str:
    """The command that runs just this again. `command` holds the options that name the port."""
    device = "" if verdict.device == "cpu" else f" --device {verdict.device}"
    target = (r.finding and r.finding.run) or r.clause.id
    return f"gxpo-conformance repro {target}{command} --dtype {r.dtype}{device}"


def footer(verdict: Verdict, results: list[Record], seconds: float) -> Record:
    counts = {v: sum(r["verdict"] == v for r in results) for v in VERDICTS}
    return {
        "record": "footer",
        "headline": verdict.headline,
        "words": verdict.words,
        "notes": verdict.notes,
        "exit_status": verdict.exit_status,
        "must": {"passed": verdict.count("MUST", PASS, ERROR), "all": verdict.must},
        "options": {"passed": verdict.count("OPTION", PASS, ERROR), "declared": verdict.declared},
        "not_run": verdict.which(BLOCKED, NOT_RUN),
        "causes": causes(results),
        "results": len(results),
        "counts": counts,
        "seconds": round(seconds, 2),
    }
