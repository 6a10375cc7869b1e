"""The ports whose source is changed, and every change of one line that universalmutator's rules make of it."""

from __future__ import annotations

import ast
import bisect
import contextlib
import functools
import hashlib
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SUITE = Path(__file__).parent.parent
# Words that a change may bring in though its file has them nowhere.
ALWAYS_THERE = frozenset(re.findall(r"\w+", "True False None not and or pass break continue if true false min max"))


@dataclass(frozen=True)
class Subject:
    """A port whose source is changed. Files are copied side by side, so that nothing refers to the originals."""

    name: str
    files: tuple[Path, ...]  # whose lines are changed
    dtypes: tuple[str, ...]
    adapter: Path | None = None  # copied unchanged
    command: str = ""  # that runs it, for a port in a process of its own

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        return {f.name: f.read_text(encoding="utf-8").splitlines(keepends=True) for f in self.files}

    @cached_property
    def version(self) -> str:
        """Of all its files together: what is known of a mutant holds for the rest of its program as it was."""
        return hashlib.sha256("".join(map("".join, self.sources.values())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Mutation:
    """`line` of a file, its `nth` of that text, made `mutated`; the number of the line is for people."""

    file: str
    line: str
    nth: int
    mutated: str
    number: int

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.file, self.line, self.nth, self.mutated

    def told(self) -> str:
        return f"{self.file}:{self.number}\n-   {self.line}\n+   " + "\n+   ".join(self.mutated.split("\n"))


def subjects() -> dict[str, Subject]:
    import gxpo_reference

    at = Path(gxpo_reference.__file__).parent
    both = ("float64", "float32")
    scripts = (at / "ports/gxpo_core.mjs", at / "ports/gxpo_port.mjs")
    return {
        "oracle": Subject("oracle", (at / "oracle.py", at / "oracle_gate.py"), both[:1], SUITE / "adapters/oracle.py"),
        "plain": Subject("plain", (at / "ports/plain.py",), both),
        "javascript": Subject("javascript", scripts, both, command="node --max-old-space-size=512 gxpo_port.mjs"),
    }


def mutations(subject: Subject, left_out: Sequence[dict[str, Any]]) -> list[Mutation]:
    """All distinct ones that are programs, outside of what lists.toml leaves out."""
    names = {*ALWAYS_THERE, *words("".join(map("".join, subject.sources.values())))}
    made: list[Mutation] = []
    for name, lines in subject.sources.items():
        outside = excluded_lines(name, lines, left_out)
        python = name.endswith(".py")
        outside |= {n for n, line in enumerate(lines, 1) if not words(line)}  # brackets
        tried = [(n, text) for n, text in changes(lines, python) if n not in outside and names.issuperset(words(text))]
        meanings = python_meanings(lines, tried) if python else javascript_meanings(lines, tried)
        seen: set[str] = set()
        for (number, text), meaning in zip(tried, meanings, strict=True):
            if meaning is not None and meaning not in seen:
                seen.add(meaning)
                line = lines[number - 1].strip()
                nth = sum(other.strip() == line for other in lines[: number - 1])
                made.append(Mutation(name, line, nth, text.strip(), number))
    return made


def sample(made: list[Mutation], size: int | None, seed: int) -> list[Mutation]:
    """So many at random, all for None: a larger one holds a smaller one, and what goes elsewhere changes no rank."""
    ranked = sorted(made, key=lambda m: hashlib.sha256(repr((seed, m.key)).encode()).digest())
    return ranked[:size]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d]\w*", text)


def changes(lines: list[str], python: bool) -> list[tuple[int, str]]:
    """universalmutator's: the number of a line, from 1, and what it becomes."""
    try:
        from universalmutator.mutator import mutants_regexp
    except ImportError as error:
        sys.exit(f"gxpo_conformance.mutation: {error}; install it by `pip install gxpo[mutation]`")
    rules = ["universal.rules", *(["python.rules"] if python else ["c_like.rules", "javascript.rules"])]
    with contextlib.redirect_stdout(io.StringIO()):
        return [(number, mutated) for number, mutated, *_ in mutants_regexp(lines, rules, ignorePatterns=[])]


def excluded_lines(name: str, lines: list[str], entries: Sequence[dict[str, Any]]) -> set[int]:
    """Numbers of lines that hold one of an entry's `lines`, or stand in a block that begins with one of `blocks`."""
    found: set[int] = set()
    for entry in entries:
        if name in entry["files"]:
            for n, line in enumerate(lines, 1):
                if any(text in line for text in entry.get("lines", [])):
                    found.add(n)
                if any(line.strip().startswith(text) for text in entry.get("blocks", [])):
                    found.update(range(n, end_of_block(lines, n)))
    return found


def end_of_block(lines: list[str], first: int) -> int:
    """The line after the block that begins at line `first`: the next one that is not indented further."""
    indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
    for n in range(first + 1, len(lines) + 1):
        line = lines[n - 1]
        if line.strip() and len(line) - len(line.lstrip()) <= indent and line.strip()[0] not in ")]}":
            return n
    return len(lines) + 1


def python_meanings(lines: list[str], tried: Sequence[tuple[int, str]]) -> Iterator[str | None]:
    """For each change a text that is equal for those that make the same program; None for what is none, or the
    original's: a comment, a docstring, an annotation."""
    tops = ast.parse("".join(lines)).body  # one of them is enough to look at, and quicker than all
    firsts = [min([top.lineno, *(d.lineno for d in getattr(top, "decorator_list", []))]) for top in tops]
    for number, text in tried:
        n = bisect.bisect_right(firsts, number) - 1
        end = tops[n].end_lineno if n >= 0 else None
        if end is None or number > end:  # between them
            yield None
            continue
        before, after = lines[firsts[n] - 1 : number - 1], lines[number:end]
        old, new = (python_meaning("".join([*before, line, *after])) for line in (lines[number - 1], text))
        yield None if new in (old, None) else f"{n} {new}"


@functools.lru_cache(maxsize=1000)
def python_meaning(source: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "mutant", "exec")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):  # docstrings and the like
            body[:] = [n for n in body if not (isinstance(n, ast.Pass) or says_nothing(n))]
            if isinstance(node, ast.For | ast.While) and body and isinstance(body[-1], ast.Continue):
                body.pop()
        if isinstance(node, ast.Dict) and None not in node.keys:  # an order that nobody reads
            entries = sorted(zip(node.keys, node.values, strict=True), key=lambda e: ast.dump(e[0]) if e[0] else "")
            node.keys, node.values = [k for k, _ in entries], [v for _, v in entries]
        if isinstance(node, ast.Call):
            node.keywords.sort(key=lambda k: k.arg or "")
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def says_nothing(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


PARSED = """
const { sources } = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(sources.map((source) => {
  try { new (require("vm").SourceTextModule)(source); return true; } catch { return false; }
})));
"""


def javascript_meanings(lines: list[str], tried: Sequence[tuple[int, str]]) -> Iterator[str | None]:
    """The same for JavaScript, where node says what is a program, and comments are known by where they begin."""
    sources = ["".join([*lines[: number - 1], text, *lines[number:]]) for number, text in tried]
    command = ["node", "--experimental-vm-modules", "--no-warnings", "-e", PARSED]
    done = subprocess.run(command, input=json.dumps({"sources": sources}), capture_output=True, text=True, check=True)
    for (number, text), program in zip(tried, json.loads(done.stdout), strict=True):
        comment = lines[number - 1].strip().startswith(("//", "/*", "*"))
        old, new = (javascript_meaning(line) for line in (lines[number - 1], text))
        yield f"{number} {new}" if program and not comment and new != old else None


def javascript_meaning(line: str) -> str:
    """Without white space, comment, and the order of an object's entries, which nobody reads."""
    bare = re.sub(r"\s+", "", line.partition("// ")[0])
    return re.sub(r"\{([^{}();.]*)\}", lambda found: "{" + ",".join(sorted(found[1].split(","))) + "}", bare)
