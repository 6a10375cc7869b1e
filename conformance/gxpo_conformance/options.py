"""What the commands' options have in common: the port, names with a suggestion, an example in every --help."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from gxpo_conformance.clauses.table import GROUPS, clauses
from gxpo_conformance.harness.harness import TIME_LIMIT
from gxpo_conformance.process.load import EMPTY, load
from gxpo_conformance.protocol import DTYPES, Port
from gxpo_conformance.suggest import did_you_mean

STATUS = (
    "Exit status: 0 every MUST and declared option ran and passed (or is listed by --known); 1 something failed, or "
    "--known lists what passes; 2 the adapter or the command line broke before a verdict; 3 incomplete, not everything "
    "ran; 130 interrupted by Ctrl-C: the verdict and the reports are of what ran until then. With --gradescope or "
    "--points: 0 every point was earned, 1 not every, 2 as above."
)


class Parser(argparse.ArgumentParser):
    """Says what was probably meant by an option that there is not."""

    commands: Sequence[str] = ()  # that somebody may have put behind an option

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]  # the overloads are about namespace
        options, rest = self.parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("-"):
                there = [text for action in self._actions for text in action.option_strings]
                self.error(f"no option {word!r}{did_you_mean(word.split('=')[0], there)}")
            if word in self.commands:
                self.error(f"{word!r} is a command and has to come first: {self.prog} {word} ...")
            self.error(f"{word!r} belongs to no option")
        return options


def command(name: str, about: str, example: str, more: str = "") -> Parser:
    """The parser of a command. `example`: one that works, without the program's name; `more`: what else helps."""
    prog = f"gxpo-conformance {name}".strip()
    return Parser(
        prog=prog,
        description=about,
        epilog=f"example:\n  {prog} {example}" + (f"\n\n{more}" if more else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def filled(text: str) -> str:
    """An option's value, which an unset variable would leave empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; probably a variable is not set")
    return text


def port(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(EMPTY)
    return text


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text}")
    return value


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an int >= 0, got {text}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int >= 1, got {text}")
    return int(text)


def chosen(text: str) -> list[str]:
    """Clauses or groups, by comma."""
    only = [o.strip().upper() for o in filled(text).split(",") if o.strip()]
    for o in only:
        if o not in GROUPS and o not in clauses():
            near = did_you_mean(o, [*GROUPS, *clauses()])
            raise argparse.ArgumentTypeError(f"no clause or group {o!r}{near} (groups: {', '.join(GROUPS)})")
    return only


def which_port(parser: argparse.ArgumentParser, time_limit: float = TIME_LIMIT) -> None:
    """The options that name a port and say where and how it runs."""
    group = parser.add_argument_group("the port")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--impl",
        type=port,
        metavar="MODULE:ATTRIBUTE",
        help="the port's adapter, called without arguments (default: the bundled gxpo.py)",
    )
    one.add_argument(
        "--exec", type=port, metavar="COMMAND", help='a port that speaks JSON lines, "node my_port.js" say (STDIO.md)'
    )
    group.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it computes (default: cpu)")
    group.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeat for several (default: all that the port declares)"
    )
    group.add_argument(
        "--time-limit",
        type=seconds,
        default=time_limit,
        metavar="SECONDS",
        help="for one request to the port, then it has failed (default: %(default)g)",
    )


def the_port(options: argparse.Namespace) -> Port:
    return load(options.impl, options.exec, options.time_limit)


def naming(options: argparse.Namespace) -> str:
    """The options that name the port, for a command that reruns something."""
    if options.exec:
        return f" --exec {shlex.quote(options.exec)}"
    return f" --impl {options.impl}" if options.impl else ""


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100)
