"""Files that a command writes: tried before anything runs, for nobody wants to lose a run to a folder misspelt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gxpo_conformance.protocol import AdapterError


def require_writable(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None] | None = None) -> None:
    """AdapterError where a file cannot be written, or two are the same. Option -> path; None where it was not given.

    What a file holds stays until it is written anew. `inputs`: files that are read, none of which may be written over.
    """
    taken: dict[Path, str] = {Path(path).resolve(): option for option, path in (inputs or {}).items() if path}
    for option, path in outputs.items():
        if path is None:
            continue
        if not path.strip():
            raise AdapterError(f"{option}: the file's name is empty, probably an unset variable: name a file")
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            continue  # /dev/null, a pipe: to open it would be to use it
        other = taken.setdefault(Path(path).resolve(), option)
        if other != option:
            raise AdapterError(f"{option} {path}: {other} names the same file; give each a file of its own")
        require_one_writable(option, path)


def require_one_writable(option: str, path: str) -> None:
    new = not os.path.lexists(path)
    try:
        with open(path, "ab"):  # to append nothing: what is there is kept
            pass
        if new:
            os.remove(path)  # no empty report is left behind when the run does not come to its end
    except OSError as error:
        raise AdapterError(f"{option}: {why(error, path)}") from error


def require_folder(option: str, path: str) -> None:
    """AdapterError where `path` is no folder that files can be written into."""
    if not os.path.isdir(path):
        what = "is not a folder" if os.path.exists(path) else "does not exist"
        raise AdapterError(f"{option} {path}: {what}; name a folder that does")
    if not os.access(path, os.W_OK | os.X_OK):
        raise AdapterError(f"{option} {path}: no permission to write into this folder")


def why(error: OSError, path: str) -> str:
    """What keeps `path` from being written, and what to do."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        return f"cannot write {path}: it is a folder; name a file in it"
    if not os.path.isdir(folder):
        return f"cannot write {path}: the folder {folder} does not exist; make it first"
    return f"cannot write {path}: {error.strerror or error}"


def write(option: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdapterError(f"{option}: {why(error, path)}") from error
