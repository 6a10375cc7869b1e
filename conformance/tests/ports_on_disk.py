"""Modules with a port in them, as somebody's adapter lies in the folder that one stands in."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

WRONG = """\
from gxpo_conformance.mutants import MUTANTS

Port = MUTANTS["alpha-on-excess"].port
"""
ORACLE = "gxpo_conformance.adapters.oracle:Port"


def put(module: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write `text` as `module` into `folder` and go there; what --impl takes."""
    (folder / f"{module}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return f"{module}:Port"


def oracle_with(session: str = "", port: str = "") -> str:
    """A module whose port is the oracle's, with these methods of its session and of itself in place of its own."""
    return (
        "import os, sys, time\n\nfrom gxpo_conformance.adapters import oracle\n\n\n"
        f"class Session(oracle.Session):\n    made = True\n{textwrap.indent(textwrap.dedent(session), '    ')}\n\n"
        "class Port(oracle.Port):\n    def start(self, *args, **more):\n"
        "        return Session(super().start(*args, **more).oracle)\n"
        f"{textwrap.indent(textwrap.dedent(port), '    ')}\n"
    )
