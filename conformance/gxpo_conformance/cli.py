"""The command gxpo-conformance."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from gxpo_conformance import interrupt, repro, smoke
from gxpo_conformance.clauses.table import CALIBRATION, CHECKS, SPEC_VERSION, clauses
from gxpo_conformance.harness.findings import CaseError
from gxpo_conformance.known import read_known
from gxpo_conformance.mutants import MUTANTS, selftest
from gxpo_conformance.mutants.nearest import Nearest, matrix_file
from gxpo_conformance.options import (
    STATUS,
    chosen,
    command,
    count,
    filled,
    naming,
    natural,
    paragraph,
    the_port,
    which_port,
)
from gxpo_conformance.outputs import require_folder, require_writable, write
from gxpo_conformance.points import read_points
from gxpo_conformance.process.stdio import StdioPort
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.reports.badge import badge
from gxpo_conformance.reports.gradescope import Marking
from gxpo_conformance.reports.html import html, matrix_page
from gxpo_conformance.reports.junit import junit
from gxpo_conformance.reports.record import Record, legible, records
from gxpo_conformance.reports.terminal import Terminal, summary
from gxpo_conformance.runs.play import SEED
from gxpo_conformance.search import search
from gxpo_conformance.suggest import did_you_mean
from gxpo_conformance.trial import Trial, judge
from gxpo_conformance.vectors import files as vectors

# ---- The commands ----------------------------------------------------------------------------------------------------


def verdict_of(arguments: Sequence[str]) -> int:
    commands = "\n".join(f"  gxpo-conformance {name:<9} {about}" for name, (about, _) in COMMANDS.items())
    parser = command(
        "",
        "Judge an implementation of GXPO, clause by clause (SPEC.md beside this package has the rules).",
        "--impl my_port:Port --html report.html",
        f"other commands, each with its own --help:\n{commands}\n\n{paragraph(STATUS)}",
    )
    parser.commands = tuple(COMMANDS)
    which_port(parser)
    parser.add_argument(
        "--only",
        type=chosen,
        default=[],
        metavar="CLAUSES",
        help="clauses or groups, by comma: EXT,GAT-07 (leaves the verdict incomplete)",
    )
    parser.add_argument(
        "--seed", type=natural, default=SEED, metavar="N", help="of the random runs, RND (default: %(default)s)"
    )
    parser.add_argument(
        "--known", type=filled, metavar="FILE", help="TOML file of known failures, each with a reason and a link"
    )
    for name, about in REPORTS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=about)
    parser.add_argument(
        "--gradescope", metavar="FILE", help="mark an exercise: write Gradescope's results.json (GRADING.md)"
    )
    parser.add_argument(
        "--points", type=filled, metavar="FILE", help="TOML file of points per clause (default: one for each MUST)"
    )
    parser.add_argument("--version", action="version", version=f"GXPO conformance spec {SPEC_VERSION}")
    options = parser.parse_args(arguments)
    outputs = {f"--{name}": getattr(options, name) for name in (*REPORTS, "gradescope")}
    require_writable(outputs, {"--known": options.known, "--points": options.points})
    if options.gradescope is None and options.points is None:
        return judged(options)[1]
    if options.known:
        parser.error("--known does not go with --gradescope and --points: what is known to fail earns no points either")
    marking = Marking(options.gradescope, read_points(options.points, options.only))
    with marking.judging():
        found, status = judged(options)
    return marking.settle(found) if status in (0, 1, 3) else status


def judged(options: argparse.Namespace) -> tuple[list[Record], int]:
    """Judge the port, tell the terminal, write the reports; the records and the verdict's exit status."""
    began = time.perf_counter()
    known = read_known(options.known) if options.known else {}
    port = the_port(options)
    verdict = judge(
        port, options.dtype, options.device, options.only, Terminal(), known, options.time_limit, options.seed
    )
    with interrupt.held():  # Ctrl-C from here on would lose the reports
        if verdict.interrupted and isinstance(port, StdioPort):
            port.end()  # it is in a session of its own, where the terminal's Ctrl-C does not come
        nearest = None if verdict.interrupted else Nearest(verdict)  # which may take seconds
        found = records(verdict, naming(options), time.perf_counter() - began, nearest, options.only)
        summary(found)
        for name in REPORTS:
            if path := getattr(options, name):
                write(f"--{name}", path, FORMATS[name](found))
    return found, verdict.exit_status


REPORTS = {
    "json": "also write JSON lines: a header, a line a clause and dtype, a footer",
    "junit": "also write JUnit XML",
    "html": "also write one self-contained page",
    "badge": "also write a badge, as shields.io reads it from an endpoint",
}
FORMATS: dict[str, Callable[[list[Record]], str]] = {
    "json": lambda found: "".join(json.dumps(r, allow_nan=False) + "\n" for r in found),
    "junit": junit,
    "html": lambda found: html(found, matrix_file()),
    "badge": badge,
}


def list_clauses(arguments: Sequence[str]) -> int:
    parser = command(
        "list",
        "Every clause: its level, its rule, the capabilities it needs; what shows it, where, in which dtypes.",
        "EXT,GAT-07",
    )
    parser.add_argument("only", nargs="?", type=chosen, default=[], help="clauses or groups, by comma: EXT,GAT-07")
    options = parser.parse_args(arguments)
    for clause in clauses().values():
        if not options.only or any(clause.id.startswith(o) for o in options.only):
            needs = f"  [{', '.join(clause.needs)}]" if clause.needs else ""
            print(f"{clause.id}  {clause.level:<6}  {clause.rule}{needs}")
            check = CHECKS[clause.id]
            leans = [lean for lean in check.leans if lean != CALIBRATION]
            print(f"{'':16}{check.function.__name__.replace('_', ' ')}, seen at {clause.seen_at}")
            print(f"{'':16}{', '.join(check.dtypes)}" + (f"; leans on {', '.join(leans)}" if leans else ""))
    return 0


def smoke_test(arguments: Sequence[str]) -> int:
    parser = command(
        "smoke",
        "Is it the adapter that is broken, or the method? A few seconds' worth of answers.",
        "--impl my_port:Port --dtype float64 --dtype float32",
        f"Without --dtype it asks in the first that the port declares.\n\n{paragraph(smoke.STATUS)}",
    )
    which_port(parser, smoke.TIME_LIMIT)
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    port = the_port(options)
    return smoke.smoke(port, options.dtype, options.device, options.time_limit, time.perf_counter() - began)


def reproduce(arguments: Sequence[str]) -> int:
    parser = command(
        "repro",
        "Play one case and show every point asked for beside the right one.",
        "MOV-01 --impl my_port:Port --dtype float64 --case case.json",
        f"{paragraph(repro.TARGETS)}\n\n{paragraph(repro.STATUS)}",
    )
    parser.add_argument("target", metavar="TARGET", type=filled)
    which_port(parser)
    parser.add_argument("--case", metavar="FILE", help="write the failing run as JSON, to be replayed anywhere")
    options = parser.parse_args(arguments)
    require_writable({"--case": options.case}, {"TARGET": options.target})
    return repro.reproduce(
        options.target, the_port(options), options.dtype, options.device, options.case, options.time_limit
    )


class Progress:
    """How many runs are done, on a terminal's standard error alone."""

    def __init__(self, what: str, of: int, refusals: list[str]) -> None:
        self.what, self.of, self.refusals, self.shown = what, of, refusals, sys.stderr.isatty()

    def __call__(self, done: int, refusal: str) -> None:
        if refusal:
            self.refusals.append(refusal)
        if self.shown:
            print(f"\r{self.what}: {done} of {self.of} runs ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def random_search(arguments: Sequence[str]) -> int:
    parser = command(
        "search",
        "Random cases over all that a port declares, shrunk to the smallest that fails.",
        "--impl my_port:Port --seeds 3 --case case.json",
        paragraph("Exit status: 0 every case passed; 1 one failed; 2 the adapter or the command line broke."),
    )
    which_port(parser)
    parser.add_argument("--seeds", type=count, default=5, help="1 to N; a verdict's is 0 (default: %(default)s)")
    parser.add_argument("--cases", type=count, default=100, help="random runs a seed and dtype (default: %(default)s)")
    parser.add_argument("--case", metavar="FILE", help="write the smallest failing run as JSON; repro FILE replays it")
    options = parser.parse_args(arguments)
    require_writable({"--case": options.case})
    trial = Trial(the_port(options), options.dtype, options.device, time_limit=options.time_limit)
    name = trial.verdict.port
    for dtype, harness in trial.harnesses.items():
        for seed in range(1, options.seeds + 1):
            refusals: list[str] = []
            progress = Progress(f"{name}, {dtype}, seed {seed}", options.cases, refusals)
            found = search(harness, seed, options.cases, progress)
            progress.end()
            print(f"{name}, {dtype}, seed {seed}: {'FAIL' if found else f'{options.cases - len(refusals)} runs pass'}")
            if refusals:
                print(f"    {len(refusals)} refused by the port, which declares them; the first: {refusals[0]}")
            if found:
                failure, case = found
                print(f"{failure}\nconfig: {json.dumps(case['config'])}")
                again = f"repro '{failure.where['run']}'{naming(options)} --dtype {dtype}"
                print(f"gxpo-conformance {again}")
                if options.case:
                    write("--case", options.case, json.dumps(case, indent=1) + "\n")
                return 1
    return 0


def check_vectors(arguments: Sequence[str]) -> int:
    parser = command(
        "vectors", "Check that the files in vectors/ are what the oracle gives, case by case.", "--write my_folder"
    )
    parser.add_argument(
        "--write",
        type=filled,
        metavar="FOLDER",
        help="write them there, ids as they are here; an id never changes what it stands for (in a checkout, to make "
        "them the suite's: conformance/gxpo_conformance/vectors)",
    )
    options = parser.parse_args(arguments)
    if options.write is None:
        return vectors.check()
    require_folder("--write", options.write)
    return vectors.write(options.write)


def test_the_suite(arguments: Sequence[str]) -> int:
    parser = command(
        "selftest",
        "Put wrong implementations through the suite: each must fail, by the right clause.",
        "alpha-on-excess",
        paragraph("Exit status: 0 each fails as it should; 1 one does not; 2 the command line broke."),
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the matrix mutants x clauses x dtypes as JSON (in a checkout, to make it the published one: "
        "conformance/gxpo_conformance/mutants/matrix.json)",
    )
    parser.add_argument("--html", metavar="FILE", help="also write it as a page")
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="only these, while one is written (default: all)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.mutants if name not in MUTANTS]:
        parser.error(f"no mutant {unknown[0]!r}{did_you_mean(unknown[0], MUTANTS)}")
    if options.mutants and (options.json or options.html):
        parser.error("the matrix is of all mutants: name none with --json or --html")
    require_writable({"--json": options.json, "--html": options.html})
    matrix = selftest.selftest(options.mutants)
    if options.json:
        write("--json", options.json, selftest.as_json(matrix))
    if options.html:
        write("--html", options.html, matrix_page(matrix))
    return 1 if matrix["problems"] else 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "list": ("the clauses", list_clauses),
    "smoke": ("is it the adapter or the method that is broken?", smoke_test),
    "repro": ("play one case, point by point", reproduce),
    "vectors": ("check the files of cases against the oracle, or write them", check_vectors),
    "search": ("random cases, shrunk to the smallest that fails", random_search),
    "selftest": ("test the suite itself by wrong implementations", test_the_suite),
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    with interrupt.listening():
        try:
            return run(given)
        except (AdapterError, CaseError) as error:
            print(f"gxpo-conformance: {legible(str(error))}", file=sys.stderr)
        except BrokenPipeError:  # whoever read the output has gone: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) or interrupt.came():  # what breaks on the way out is of no interest
                print("gxpo-conformance: interrupted", file=sys.stderr)
                return interrupt.STATUS
            traceback.print_exc()  # the suite's own fault; 1 would say that the port failed
    return 2


def run(given: list[str]) -> int:
    """The command that the first word names; without one the verdict."""
    if not given or given[0].startswith("-"):
        return verdict_of(given)
    name, *rest = given
    if name not in COMMANDS:
        there = ", ".join(COMMANDS)
        raise AdapterError(
            f"no command {name!r}{did_you_mean(name, COMMANDS)} (the commands: {there}; --help has more)"
        )
    return COMMANDS[name][1](rest)


if __name__ == "__main__":
    sys.exit(main())
