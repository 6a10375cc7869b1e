"""Failures that a port's author knows of: a TOML file, each entry with its reason and a link.

[[known]]
clause = "EXT-05"
dtypes = ["float32"]                  # left out: all of them
reason = "the sum is divided by 1 + r; near r = -1 that loses three digits"
link = "https://example.org/my-port/issues/7"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from gxpo_conformance.clauses.table import clauses
from gxpo_conformance.protocol import DTYPES, AdapterError
from gxpo_conformance.suggest import did_you_mean, no_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("clause", "dtypes", "reason", "link")


@dataclass(frozen=True)
class Known:
    clause: str
    reason: str
    link: str
    dtypes: tuple[str, ...] = ()


def read_known(path: str) -> dict[str, Known]:
    """The file's entries by clause. AdapterError that names the entry, and what is wrong with it."""
    try:
        file = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AdapterError(f"--known {path}: {error}") from error
    if unknown := [key for key in file if key != "known"]:
        raise AdapterError(f"--known {path}: {no_key(unknown[0], ['known'])}; entries are [[known]] tables")
    entries = file.get("known", [])
    found: dict[str, Known] = {}
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise AdapterError(f"--known {path}: entries must be [[known]] tables")
    for n, entry in enumerate(entries, 1):
        where = f"--known {path}, entry {n}"
        if unknown := [key for key in entry if key not in KEYS]:
            raise AdapterError(f"{where}: {no_key(unknown[0], KEYS)}")
        for key in ("clause", "reason", "link"):
            if not (isinstance(entry.get(key), str) and entry[key].strip()):
                raise AdapterError(f"{where}: {key} must be a text that is not empty, got {entry.get(key)!r}")
        if entry["clause"] not in clauses():
            near = did_you_mean(entry["clause"], clauses())
            raise AdapterError(f"{where}: no clause {entry['clause']!r}{near} (gxpo-conformance list shows them)")
        if entry["clause"] in found:
            raise AdapterError(f"{where}: {entry['clause']} is listed twice")
        dtypes = entry.get("dtypes", [])
        if not isinstance(dtypes, list) or not all(dtype in DTYPES for dtype in dtypes):
            raise AdapterError(f"{where}: dtypes must be a list out of {list(DTYPES)}, got {dtypes!r}")
        found[entry["clause"]] = Known(entry["clause"], entry["reason"], entry["link"], tuple(dtypes))
    return found
