"""From what a user names to a port."""

from __future__ import annotations

import importlib
import os
import sys

from gxpo_conformance.process.stdio import StdioPort
from gxpo_conformance.protocol import AdapterError, Port

BUNDLED = "gxpo_conformance.adapters.torch:Port"


def load(impl: str = "", command: str = "", time_limit: float = 30.0) -> Port:
    """The adapter `impl` ("module:attribute", called without arguments), or a process started by `command`; the
    bundled gxpo.py where neither is named. AdapterError says what went wrong on the way."""
    if impl and command:
        raise AdapterError(f"name one port: --impl {impl} or --exec {command!r}, not both")
    if command:
        return StdioPort(command, time_limit)
    module, _, attribute = (impl or BUNDLED).partition(":")
    if not module or not attribute:
        raise AdapterError(f"--impl must be module:attribute (my_port.adapter:Port, say), got {impl!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a port in the folder one stands in
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (Exception, SystemExit) as error:
        if not impl and getattr(error, "name", None) == "torch":
            why = "no port is named (--impl, --exec), and the bundled gxpo.py needs torch: pip install torch"
            raise AdapterError(why) from None
        raise AdapterError(f"--impl {impl or BUNDLED}: {type(error).__name__}: {error}") from error
