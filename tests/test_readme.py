"""What README.md promises: its snippets run, its numbers are printed, its first block is two commands."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import gxpo
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.ports import torch_port
from gxpo_conformance.run import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def test_the_first_sh_block_is_two_commands() -> None:
    lines = [line for line in next(text for kind, text in BLOCKS if kind == "sh").splitlines() if line.strip()]
    assert len(lines) == 2
    assert "gxpo-conformance" in lines[0]
    assert "pytest" in lines[1]


def test_snippets_run_in_order_and_print_what_is_shown() -> None:
    """People paste them. A text block after a snippet is what it prints."""
    names: dict[str, Any] = {}
    ran = 0
    for (kind, text), (next_kind, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README.md", "exec"), names)
        ran += 1
        if next_kind == "text":
            assert printed.getvalue() == shown
    assert ran == 3
    assert names["optimizer"].report.outcome == "active"


def test_the_verdict_shown_is_the_verdict() -> None:
    verdict = run(torch_port.Port(), ["float64", "float32"])
    assert f"GXPO 1.0: {verdict.headline}\nverdict: {verdict.words}\n" in README


def test_the_number_of_mutants_is_the_number() -> None:
    assert f"tested by {len(MUTANTS)} wrong implementations" in README


def test_the_argument_tables_are_complete_and_their_defaults_true() -> None:
    """A table that lies about a default costs somebody a training run."""
    opt = gxpo.GXPO(gxpo.torch.optim.SGD([gxpo.torch.ones(1, requires_grad=True)], lr=0.1))
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", README, re.M))
    for name in gxpo.GXPO._SETTINGS:
        assert rows[name] == ("Gate()" if name == "gate" else repr(getattr(opt, name)).replace("'", '"')), name
    for name in gxpo.Gate.__dataclass_fields__:
        assert re.search(rf"^\| (`\w+`, )*`{name}`", README, re.M), name
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]*) \|", README, re.M):
        for name, value in zip(re.findall(r"\w+", names), values.replace("`", "").split(", "), strict=True):
            if name in gxpo.Gate.__dataclass_fields__:
                assert value == repr(getattr(gxpo.Gate(), name)).replace("'", '"'), name


def test_the_first_block_of_costs_holds() -> None:
    """Passes are counted by the suite (CST-01), memory in test_step.py; the copy of the state is optional."""
    assert "| backward passes | 3, whatever K (SFPO: K + 1) | 1 |" in README


def test_gxpo_py_stands_alone() -> None:
    """People copy the one file: it may import torch and the standard library only, and says what it is."""
    text = Path(gxpo.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    assert imported <= {"__future__", "torch", "contextlib", "dataclasses", "functools", "math", "statistics",
                        "collections", "copy", "typing"}  # fmt: skip
    head = "\n".join(text.splitlines()[:3])
    assert f"gxpo.py {gxpo.__version__}" in head
    assert f"conformance spec {gxpo.SPEC_VERSION}" in head
    assert "MIT" in head
