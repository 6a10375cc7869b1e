"""The command python -m gxpo_reference.benchmarks cuda-day."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gxpo_reference.benchmarks.cuda_day import report
from gxpo_reference.benchmarks.cuda_day.parts import Part, parts
from gxpo_reference.benchmarks.cuda_day.run import FAILED, LEFT_OUT, Record, conditions, run
from gxpo_reference.benchmarks.tables import text

PROG = "python -m gxpo_reference.benchmarks cuda-day"
DESCRIPTION = """\
Everything that has to be seen on a GPU, part by part, and one report of it: the tests that need CUDA, the suite and the
benchmarks on it, models of 1e8 to 1e9 parameters in float32 and bfloat16 as far as memory goes, the toy tasks, TRL's
trainer, and all other tests beside a GPU. Needs a checkout and pip install -c constraints.txt -e ".[test,trainers]"
with a torch that is built for CUDA. It takes an hour or more; --quick takes minutes, with sizes that say nothing.

Each part is a process of its own with a time limit: what breaks in one does not end the others. A part that has ended,
however, is not run again by the same command, unless gxpo.py, torch or the GPU have changed since, or with --again.
FOLDER/report.md is written after each part; FOLDER/report.json has all of it, FOLDER/parts/ the logs.
"""
EPILOG = "Exit status: 0 no part failed; 1 some did; 2 the command line is wrong, or there is no CUDA; 130 interrupted."


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        PROG, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--out", type=Path, default=Path("cuda-day"), metavar="FOLDER", help="where all goes (default: %(default)s)"
    )
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="tiny sizes, and of the tests that need no CUDA a few")
    options.add_argument(
        "--only", nargs="+", metavar="PART", help="these alone; growth stands for all parts whose names begin so"
    )
    options.add_argument("--again", action="store_true", help="run parts that are done as well")
    options.add_argument("--list", action="store_true", help="the parts and their commands; runs nothing")
    return options


def no_cuda() -> str:
    built = "" if torch.version.cuda or torch.version.hip else ", which is built without it"
    return (
        f"torch {torch.__version__}{built}, sees no CUDA device. A dry run of everything, with tiny sizes on the CPU: "
        f"{PROG} --device cpu --quick"
    )


def chosen(every: list[Part], only: list[str] | None) -> list[Part] | str:
    """Those named; or the name of which there is no part."""
    unknown = [name for name in only or () if not any(part.name.startswith(name) for part in every)]
    if unknown:
        return unknown[0]
    exact = {part.name for part in every}.intersection(only or ())
    begins = tuple(name for name in only or [""] if name not in exact)
    return [p for p in every if p.kind == "environment" or p.name in exact or (begins and p.name.startswith(begins))]


def done(part: Part, folder: Path, under: dict[str, Any]) -> Record | None:
    """What was kept of it, if under the same conditions."""
    try:
        record = Record(**json.loads((folder / f"{part.name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.conditions == under else None


def another_day(folder: Path, device: str, quick: bool) -> str:
    """What kind of day a folder holds already, if it is another one."""
    try:
        held = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["conditions"]
    except (OSError, ValueError, KeyError):
        return ""
    kinds = [f"--device {d}{' --quick' * q}" for d, q in ((held["device"], held["quick"]), (device, quick))]
    return kinds[0] if kinds[0] != kinds[1] else ""


def keep(record: Record, folder: Path, under: dict[str, Any]) -> Record:
    record.conditions = under
    text = json.dumps(record.as_json(), indent=1) + "\n"
    (folder / f"{record.part}.json").write_text(text, encoding="utf-8")
    return record


def left_out(part: Part, facts: dict[str, Any]) -> str:
    """Why it is not even tried; empty where it is."""
    free = facts.get("free_memory")
    if free is not None and part.bytes >= 0.9 * free:
        return f"needs about {part.bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    return part.missing()


class Day:
    """The parts that are wanted, one after the other, and the report of those that have ended."""

    def __init__(self, every: list[Part], given: argparse.Namespace, out: Path) -> None:
        self.every, self.given, self.out, self.folder = every, given, out, out / "parts"
        self.records: dict[str, Record] = {}
        self.facts: dict[str, Any] = {}

    def run(self, wanted: list[Part]) -> None:
        for at, part in enumerate(wanted, 1):
            place = f"[{at} of {len(wanted)}] {part.name}"
            under = conditions(self.given.device, self.given.quick, self.facts)
            record = None if self.given.again or part.kind == "environment" else done(part, self.folder, under)
            if record is not None and record.outcome != LEFT_OUT:  # memory may be free by now
                print(f"{place}: {record.outcome} before", flush=True)
            else:
                print(f"{place}: {part.about} (at most {part.minutes:g} min)", flush=True)
                record = self.one(part)
                keep(record, self.folder, under)
                why = f": {record.why}" if record.why else ""
                print(f"    {record.outcome} in {record.seconds:.0f} s{why}", flush=True)
            self.records[part.name] = record
            if part.kind == "environment":
                if record.outcome == FAILED:
                    print("\n".join(record.log_ends), flush=True)
                    return  # nothing else would run
                self.facts = record.figures
                self.recall(wanted)
            self.write()

    def one(self, part: Part) -> Record:
        why = left_out(part, self.facts)
        if not why:
            return run(part, self.folder, self.given.device)
        return Record(part.name, part.kind, part.about, "", LEFT_OUT, why)

    def recall(self, wanted: list[Part]) -> None:
        """Parts that are not wanted now, but were done before, belong into the report."""
        under = conditions(self.given.device, self.given.quick, self.facts)
        for part in self.every:
            if (part not in wanted or not self.given.again) and (record := done(part, self.folder, under)):
                self.records.setdefault(part.name, record)

    def write(self) -> dict[str, Any]:
        ended = [self.records[part.name] for part in self.every if part.name in self.records]
        missing = [part.name for part in self.every if part.name not in self.records]
        return report.write(self.out, ended, missing, self.given.device, self.given.quick)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    if given.device == "cuda" and not given.list and not torch.cuda.is_available():
        options.error(no_cuda())
    out = given.out.absolute()
    every = parts(out / "parts", given.device, given.quick)
    wanted = chosen(every, given.only)
    if isinstance(wanted, str):
        options.error(f"--only {wanted}: no part's name begins so; there are {', '.join(part.name for part in every)}")
    if given.list:
        rows = [("part", "minutes at most", "command")]
        rows += [(part.name, f"{part.minutes:g}", " ".join(["python", *part.command])) for part in wanted]
        print(text(rows))
        return 0
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.error(f"--out {given.out}: {error}")

    if (other := another_day(out / "parts", given.device, given.quick)) and not given.again:
        options.error(f"--out {given.out} holds a day with {other}: give another folder, or --again to replace it")

    day = Day(every, given, out)
    try:
        day.run(wanted)
    except KeyboardInterrupt:
        day.write()
        print(f"\nstopped; the same command goes on from here. So far: {out / 'report.md'}")
        return 130
    verdict = day.write()["verdict"]
    print(f"\n{verdict}\n{out / 'report.md'}")
    return 1 if any(record.outcome == FAILED for record in day.records.values()) else 0
