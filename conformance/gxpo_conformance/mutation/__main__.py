"""How many mistakes that nobody thought of the suite rejects: mutants made by operators, judged by the suite alone.

python -m gxpo_conformance.mutation oracle|plain|javascript

universalmutator's rules (an operator for another, a number off by one, theta1 for theta0, a condition turned round, a
statement gone) change one line of a right port at a time: of the oracle, which the suite's own, unchanged oracle then
judges, of ports/plain.py, or of the JavaScript port. Each mutant runs in a process of its own until the first clause
that rejects it. What comes of it:

caught         a clause saw that it does something else
crashed        it raised or died; told apart, for that needs no suite
timed out      it did not come back
did not load   no program, or no port
equivalent     it passes, and lists.toml says why it is right as well
survived       it passes, and nothing says why: the suite has a hole

What is done is kept in --work and not done again. The figures go to figures.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gxpo_conformance.clauses.table import SPEC_VERSION
from gxpo_conformance.mutation.judging import CAUGHT, CRASHED, NOT_LOADED, SURVIVED, TIMED_OUT, judged, outcome
from gxpo_conformance.mutation.operators import Mutation, Subject, mutations, sample, subjects
from gxpo_conformance.options import chosen, count

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
EQUIVALENT = "equivalent"
OUTCOMES = (CAUGHT, SURVIVED, EQUIVALENT, CRASHED, TIMED_OUT, NOT_LOADED)


def listed() -> dict[str, list[dict[str, Any]]]:
    """lists.toml: what is left out, and what is equivalent."""
    return tomllib.loads((HERE / "lists.toml").read_text(encoding="utf-8"))


def reasons(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], str]:
    """(file, line, mutated line) -> why that is right as well."""
    return {(e["file"], line, mutated): e["why"] for e in entries for line, mutated in e["mutations"]}


def known_results(work: Path, version: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What earlier runs found of this version of the source."""
    if not work.exists():
        return {}
    rows = [json.loads(line) for line in work.read_text(encoding="utf-8").splitlines()]
    return {tuple(row["key"]): row["found"] for row in rows if row["version"] == version}


def tally(found: dict[Mutation, str]) -> str:
    counts = collections.Counter(found.values())
    told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES)
    return f"{len(found)} judged: {told}; {share(counts)} of those that run and are wrong"


def share(counts: collections.Counter[str]) -> str:
    wrong = counts[CAUGHT] + counts[SURVIVED]
    return f"{100 * counts[CAUGHT] / wrong:.1f} % caught" if wrong else "nothing caught"


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        "python -m gxpo_conformance.mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("oracle", "plain", "javascript"), help="whose source is changed")
    parser.add_argument("--sample", type=count, metavar="N", help="so many of them, at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=count, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--only", type=chosen, default=[], help="clauses or groups that judge; writes no figures")
    parser.add_argument("--again", action="store_true", help="judge once more what survived or timed out")
    parser.add_argument("--report", action="store_true", help="judge none; the figures of what is done so far")
    parser.add_argument("--work", type=Path, default=Path("build/mutation"), help="folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=HERE / "figures.json", help="figures (default: the suite's)")
    options = parser.parse_args(arguments)
    subject, lists = subjects()[options.subject], listed()
    made = mutations(subject, lists["excluded"])
    order = sample(made, options.sample, options.seed)
    work = options.work / f"{subject.name}{'.' + '.'.join(options.only) if options.only else ''}.jsonl"
    done = known_results(work, subject.version)
    if options.again:
        done = {k: row for k, row in done.items() if row["outcome"] not in (SURVIVED, TIMED_OUT)}
    waiting = [] if options.report else [m for m in order if m.key not in done]
    say(f"{subject.name}: {len(made)} mutations, {len(order)} chosen, {len(waiting)} to judge")
    if waiting:
        with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
            right = outcome(subject, Path(folder), None, options.only)
        if right["outcome"] != SURVIVED:
            sys.exit(f"gxpo_conformance.mutation: the unchanged {subject.name} does not pass: {right}")
        options.work.mkdir(parents=True, exist_ok=True)
    with work.open("a", encoding="utf-8") if waiting else contextlib.nullcontext() as file:
        for n, (mutation, found) in enumerate(judged(subject, waiting, options.jobs, options.only), 1):
            done[mutation.key] = found
            assert file is not None  # something was waiting
            file.write(json.dumps({"version": subject.version, "key": mutation.key, "found": found}) + "\n")
            file.flush()
            if n % 20 == 0 or found["outcome"] == SURVIVED:
                say(f"{n}/{len(waiting)}  {found['outcome']}  {mutation.told() if 'by' not in found else found['by']}")
    return report(subject, order, len(made), done, options, reasons(lists.get("equivalent", [])), say)


def report(
    subject: Subject,
    order: Sequence[Mutation],
    size: int,
    done: dict[tuple[Any, ...], dict[str, Any]],
    options: argparse.Namespace,
    equivalent: dict[tuple[str, str, str], str],
    say: Callable[[str], None],
) -> int:
    """Says what came out and writes it; 1 where something survived."""
    found = {m: done[m.key]["outcome"] for m in order if m.key in done}
    same = [m for m in found if (m.file, m.line, m.mutated) in equivalent]
    for m in same:
        if found[m] != SURVIVED:
            say(f"lists.toml calls this equivalent, and it was {found[m]}: {m.told()}")
    found |= {m: EQUIVALENT for m in same if found[m] == SURVIVED}
    survivors = [m for m in found if found[m] == SURVIVED]
    for m in survivors:
        say(m.told())
    say(f"{subject.name}: {tally(found)}")
    if not options.only:
        counts = collections.Counter(found.values())
        figures = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        figures[subject.name] = {
            "specification": SPEC_VERSION,
            "tool": f"universalmutator {metadata.version('universalmutator')}",
            "source": subject.version,
            **{"mutations": size, "seed": options.seed, "judged": len(found)},
            **{o: counts[o] for o in OUTCOMES},
            "survivors": [m.told() for m in survivors],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
