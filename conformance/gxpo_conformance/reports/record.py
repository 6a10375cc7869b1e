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
from gxpo_conformance.mutants.nearest import Nearest, how
from gxpo_conformance.trial import BLOCKED, KNOWN, NOT_RUN, PASS, VERDICTS, Result, Verdict
from gxpo_conformance.wire import number

FORMAT = 1  # of these records; a field may be added, none changes its meaning

Record = dict[str, Any]

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
        made += [result(r, verdict, command, nearest) for r in (results or {}).values()]
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


def result(r: Result, verdict: Verdict, command: str, nearest: Nearest | None) -> Record:
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
        made["case"] = r.case()
        found = nearest.of(r) if nearest and r.verdict != KNOWN else None
        if found:
            made["nearest"] = {"how": how(r.finding), "id": found.id, "does": found.does, "source": found.source}
    return made


def rerun(r: Result, verdict: Verdict, command: str) -> str:
    """The command that runs just this again. `command` holds the options that name the port."""
    device = "" if verdict.device == "cpu" else f" --device {verdict.device}"
    return f"gxpo-conformance repro {r.clause.id}{command} --dtype {r.dtype}{device}"


def footer(verdict: Verdict, results: list[Record], seconds: float) -> Record:
    counts = {v: sum(r["verdict"] == v for r in results) for v in VERDICTS}
    return {
        "record": "footer",
        "headline": verdict.headline,
        "words": verdict.words,
        "exit_status": verdict.exit_status,
        "must": {"passed": verdict.count("MUST", PASS), "all": verdict.must},
        "options": {"passed": verdict.count("OPTION", PASS), "declared": verdict.declared},
        "not_run": verdict.which(BLOCKED, NOT_RUN),
        "results": len(results),
        "counts": counts,
        "seconds": round(seconds, 2),
    }
