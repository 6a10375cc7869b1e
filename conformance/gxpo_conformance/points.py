"""What a clause is worth where the suite marks an exercise: a TOML file, given with --points.

total = 100                # scale all points to this sum; left out: as they are
default = 1                # of each clause that counts and that no line below names
required = ["CLP"]         # options that count: one that the port does not declare earns nothing
hidden = ["TOY", "INV-08"] # shown to students after the due date
visibility = "after_due_date"

[groups]                   # of each clause in the group that counts
EXT = 2

[clauses]
EXT-05 = 4

What counts: every MUST, and the options under `required`. So an exercise is worth the same to everybody, whatever a
port declares. GRADING.md beside this file has it at length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gxpo_conformance.clauses.table import GROUPS, clauses
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.suggest import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("total", "default", "required", "hidden", "visibility", "groups", "clauses")
VISIBILITIES = ("after_due_date", "after_published")  # "hidden" is for tests without points, says Gradescope
MOST = 1e6  # points of a clause, or in all: more is a slip, and sums stay exact enough to be shown


@dataclass(frozen=True)
class Points:
    worth: dict[str, float] = field(default_factory=dict)  # clause -> points, of those that count
    hidden: frozenset[str] = frozenset()
    visibility: str = VISIBILITIES[0]

    @property
    def all(self) -> float:
        return math.fsum(self.worth.values())


def read_points(path: str | None, only: Iterable[str] = ()) -> Points:
    """The file's points, one for each MUST without a file; of the clauses or groups `only`, where it names some.
    AdapterError that names the entry, what is wrong with it and what to do."""
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AdapterError(f"--points {path}: {error}") from error
    where = f"--points {path}"
    for key in given:
        named(key, KEYS, where, "key")
    tables: dict[str, dict[str, float]] = {}
    for table, names in (("groups", GROUPS), ("clauses", clauses())):
        found = given.get(table, {})
        if not isinstance(found, dict):
            raise AdapterError(f"{where}: {table} must be a table, [{table}], with a line NAME = points, got {found!r}")
        for name, points in found.items():
            named(name, names, f"{where}, [{table}]", table[:-1])
            number(points, f"{where}, [{table}] {name}")
        tables[table] = found
    default = number(given.get("default", 1), f"{where}: default")
    required = listed(given, "required", where)
    counts = {c.id: c for c in clauses().values() if c.level == "MUST" or c.id in required}
    check_counted(tables, counts, where)
    chosen = tuple(only)
    worth = {c: tables["clauses"].get(c, tables["groups"].get(c[:3], default)) for c in counts}
    worth = {c: float(points) for c, points in worth.items() if points and (not chosen or c.startswith(chosen))}
    if not worth:
        what = f"no clause of {', '.join(chosen)} is" if chosen else f"{where}: no clause is"
        raise AdapterError(f"{what} worth a point. Options count where the file of --points lists them under required.")
    total = number(given.get("total", 1), f"{where}: total")
    if not total:
        raise AdapterError(f"{where}: total must be a number > 0, got {given['total']!r}")
    if "total" in given:
        scale = total / math.fsum(worth.values())
        worth = {c: points * scale for c, points in worth.items()}
    visibility = given.get("visibility", VISIBILITIES[0])
    if visibility not in VISIBILITIES:
        raise AdapterError(f"{where}: visibility must be one of {', '.join(VISIBILITIES)}, got {visibility!r}")
    return Points(worth, frozenset(listed(given, "hidden", where)), visibility)


def named(name: str, names: Iterable[str], where: str, kind: str) -> None:
    """AdapterError where `name` is none of `names`, with the nearest that is."""
    if name not in names:
        groups = [n for n in names if "-" not in n]  # ninety clauses would not help
        meant = did_you_mean(name, names) or (f"; there are {', '.join(groups)}" if groups else "")
        raise AdapterError(f"{where}: no {kind} {name!r}{meant} (gxpo-conformance list shows the clauses)")


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise AdapterError(f"{where} must be a number of points from 0 to {MOST:g}, got {value!r}")
    return value


def listed(given: dict[str, Any], key: str, where: str) -> set[str]:
    """The clauses that a list of clauses and groups names."""
    entries = given.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise AdapterError(
            f'{where}: {key} must be a list of clauses and groups, ["CLP", "CKP-01"] say, got {entries!r}'
        )
    for entry in entries:
        named(entry, [*GROUPS, *clauses()], f"{where}, {key}", "clause or group")
    return {c for c in clauses() if c in entries or c[:3] in entries}


def check_counted(tables: dict[str, dict[str, float]], counts: Iterable[str], where: str) -> None:
    """Points for what does not count would be promised and never given."""
    for clause in tables["clauses"]:
        if clause not in counts:
            raise AdapterError(f"{where}, [clauses] {clause} is an option: it counts only where required lists it, too")
    for group in tables["groups"]:
        if not any(c.startswith(group) for c in counts):
            raise AdapterError(
                f"{where}, [groups] {group} has options alone: they count only where required lists them"
            )
