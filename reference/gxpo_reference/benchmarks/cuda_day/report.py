"""The report of a day: its verdict first, then what failed, what was skipped and why, and the tables."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from gxpo_reference.benchmarks import growth, memory, overhead, stages, steps
from gxpo_reference.benchmarks.contenders import ACTIVE, FALLBACK, PLAIN
from gxpo_reference.benchmarks.cuda_day.run import FAILED, LEFT_OUT, PASSED, Record
from gxpo_reference.benchmarks.tables import markdown

Row = tuple[str, ...]
NOT_IN_IT = (
    "several GPUs, NCCL, DDP and FSDP2 on GPUs, CUDA graphs, torch.compile on a GPU, GPUs of several kinds; TRL on a "
    "model of real size; JAX on a GPU"
)


@functools.cache
def template() -> jinja2.Template:
    environment = jinja2.Environment(  # Markdown, not HTML
        loader=jinja2.PackageLoader("gxpo_reference.benchmarks.cuda_day", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = markdown
    return environment.get_template("report.md.jinja")


def write(out: Path, records: list[Record], not_run: list[str], device: str, quick: bool) -> dict[str, Any]:
    """report.md and report.json; returns the latter."""
    found = summary(records, not_run, device, quick)
    page = template().render(found, tables=tables(records, device), records=records, not_in_it=NOT_IN_IT)
    (out / "report.md").write_text(page, encoding="utf-8")
    whole = {**found, "parts": [record.as_json() for record in records]}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def summary(records: list[Record], not_run: list[str], device: str, quick: bool) -> dict[str, Any]:
    outcomes = Counter(record.outcome for record in records)
    where = next((r.figures.get("device", device) for r in records if r.kind == "environment"), device)
    counts = [f"{outcomes[PASSED]} parts passed", f"{outcomes[FAILED]} failed", f"{outcomes[LEFT_OUT]} left out"]
    counts += [f"{len(not_run)} not run"] if not_run else []
    skipped: Counter[str] = Counter()
    for record in of_kind(records, "tests"):
        skipped.update(record.figures["skipped"])
    return {
        "verdict": f"{where}: {', '.join(counts)}",
        "dry": device == "cpu",
        "quick": quick,
        "not_run": not_run,
        "passed": list(names(records, PASSED)),
        "failed": names(records, FAILED),
        "left_out": names(records, LEFT_OUT),
        "skipped": dict(skipped.most_common()),
        "seconds": sum(record.seconds for record in records),
    }


def names(records: list[Record], outcome: str) -> dict[str, str]:
    return {record.part: record.why for record in records if record.outcome == outcome}


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """Those that left figures."""
    return [record for record in records if record.kind == kind and record.figures]


def tables(records: list[Record], device: str) -> dict[str, list[Row]]:
    """Title -> rows, the first of which are headings; those without a row below are left away."""
    results = {record.part: record.figures["results"] for record in of_kind(records, "benchmark")}
    made = {
        "Tests": tests(records),
        "The suite": suite(records),
        "Models": models(results),
        "What GXPO adds to three plain steps, gradients for nothing": overheads(results, device),
        **settings(results, device),
        "From small to large": growths(results),
        "Memory": memories(results),
        "Toy tasks": toys(records),
        "TRL": [("", "said"), *((r.part, line) for r in of_kind(records, "trainer") for line in r.figures["said"])],
        "Where": where(records),
    }
    return {title: rows for title, rows in made.items() if len(rows) > 1}


def tests(records: list[Record]) -> list[Row]:
    rows: list[Row] = [("", "passed", "failed", "skipped", "s")]
    for record in of_kind(records, "tests"):
        figures = record.figures
        counts = (figures["passed"], len(figures["failed"]), sum(figures["skipped"].values()))
        rows.append((record.part, *map(str, counts), f"{record.seconds:.0f}"))
    return rows


def suite(records: list[Record]) -> list[Row]:
    rows: list[Row] = [("", "clauses")]
    for record in of_kind(records, "conformance"):
        rows.append(("verdict", f"{record.figures['words']}; {record.figures['headline']}"))
        for dtype, counts in record.figures["counts"].items():
            rows.append((dtype, ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))))
    return rows


def models(results: dict[str, Any]) -> list[Row]:
    """What one would ask of a model of that size, a line each."""
    plain, peak = "peak of plain AdamW", "GXPO's peak"
    rows: list[Row] = [("parameters", "dtype", "step / 3 plain", "fallback / plain", "share added", plain, peak)]
    found: dict[str, list[str]] = {}
    for part, result in results.items():
        what, _, of = part.partition("-")
        size, _, dtype = of.partition("-")
        if not dtype:
            continue
        cells = found.setdefault(of, [size, dtype, *[""] * 5])
        if what == "growth":
            for row in result["growth"]:
                if row["kind"] == "transformer" and "skipped" not in row:
                    for at, name in ((2, ACTIVE), (3, FALLBACK)):
                        cells[at] = f"{row['steps']['contenders'][name]['ratio']['median']:.3f}"
        elif what == "overhead":
            cells[4] = next((f"{r['share']['median']:.2f}" for r in result["overhead"] if "share" in r), "")
        elif what == "memory":
            for at, name in ((5, PLAIN), (6, ACTIVE)):
                peak_bytes = result["memory"]["contenders"][name]["peak_bytes"]
                cells[at] = f"{1 + peak_bytes / result['memory']['parameter_bytes']:.2f} x parameters"
    return rows + [tuple(cells) for cells in found.values()]


def overheads(results: dict[str, Any], device: str) -> list[Row]:
    rows: list[Row] = []
    for result in results.values():
        for row in result.get("overhead", ()):
            head, *found = overhead.table([row], device)
            rows = rows or [("dtype", *head)]
            rows += [(row["dtype"], *cells) for cells in found]
    return rows


def settings(results: dict[str, Any], device: str) -> dict[str, list[Row]]:
    """The two benchmarks that have every setting."""
    made: dict[str, list[Row]] = {}
    if found := results.get("steps", {}).get("steps"):
        made[f"Whole steps: {found['problem']}"] = steps.table(found, device)
    if found := results.get("stages", {}).get("stages"):
        made[f"Stages of a step: {found['problem']}"] = stages.table(found)
    return made


def growths(results: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for part, result in results.items():
        if "growth" in result:
            head, *found = growth.table(result["growth"])
            dtype = "bfloat16" if part.endswith("bfloat16") else "float32"
            rows = rows or [("dtype", *head)]
            rows += [(dtype, *cells) for cells in found]
    return rows


def memories(results: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for result in results.values():
        if "memory" in result:
            head, *found = memory.table(result["memory"])
            rows = rows or [("model", *head)]
            rows += [(result["memory"]["problem"] if not at else "", *cells) for at, cells in enumerate(found)]
    return rows


def toys(records: list[Record]) -> list[Row]:
    rows: list[Row] = [("accuracy after 20 steps", "grpo", "gxpo", "s")]
    for record in of_kind(records, "toy"):
        ends = record.figures["accuracy"]
        cells = [f"{ends[name]:.3f}" if name in ends else "" for name in ("grpo", "gxpo")]
        rows.append((record.part.removeprefix("toy-"), *cells, f"{record.seconds:.0f}"))
    return rows


def where(records: list[Record]) -> list[Row]:
    rows: list[Row] = [("", "")]
    for record in of_kind(records, "environment"):
        for name, value in record.figures.items():
            if name == "packages":
                rows += [(package, version) for package, version in value.items()]
            elif name in ("memory", "free_memory") and value is not None:
                rows.append((name.replace("_", " "), f"{value / 1e9:.1f} GB"))
            else:
                rows.append((name.replace("_", " "), str(value)))
    return rows
