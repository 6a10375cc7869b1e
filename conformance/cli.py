"""The command gxpo-conformance."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from gxpo_conformance import report
from gxpo_conformance.bench import CaseError
from gxpo_conformance.checks import GROUPS, SPEC_VERSION, clauses
from gxpo_conformance.protocol import DTYPES, AdapterError, Port
from gxpo_conformance.run import run

BUNDLED = "gxpo_conformance.ports.torch_port:Port"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gxpo-conformance",
        description="Judge an implementation of GXPO, clause by clause (see SPEC.md beside this package).",
        epilog="Exit status: 0 every MUST and declared option ran and passed; 1 something failed; 2 the adapter broke "
        "before a verdict; 3 incomplete, not everything ran.",
    )
    made.add_argument(
        "--impl",
        default=BUNDLED,
        metavar="MODULE:ATTRIBUTE",
        help="the port's adapter, called without arguments (default: %(default)s, the bundled gxpo.py)",
    )
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the port computes (default: cpu)")
    made.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeat for several (default: all that the port declares)"
    )
    made.add_argument(
        "--only",
        default="",
        metavar="CLAUSES",
        help="clauses or groups, by comma: EXT,GAT-07 (leaves the verdict incomplete)",
    )
    made.add_argument("--version", action="version", version=f"GXPO conformance spec {SPEC_VERSION}")
    return made


def load(name: str) -> Port:
    """The adapter that --impl names. AdapterError says what went wrong on the way."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise AdapterError(f"--impl must be module:attribute (my_port.adapter:Port, say), got {name!r}")
    sys.path.insert(0, "")  # a port in the folder one stands in
    try:
        return getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise AdapterError(f"--impl {name}: {type(error).__name__}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    only = [o.strip().upper() for o in options.only.split(",") if o.strip()]
    for o in only:
        if o not in GROUPS and o not in clauses():
            parser().error(f"--only names no clause or group: {o} (groups: {', '.join(GROUPS)})")
    began = time.perf_counter()
    try:
        verdict = run(load(options.impl), options.dtype, options.device, only, report.Terminal())
    except (AdapterError, CaseError) as error:
        print(f"gxpo-conformance: {error}", file=sys.stderr)
        return 2
    report.summary(verdict, time.perf_counter() - began)
    return verdict.exit_status


if __name__ == "__main__":
    sys.exit(main())
