"""From what a user names to a port."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

from gxpo_conformance import interrupt
from gxpo_conformance.process.stdio import StdioPort
from gxpo_conformance.protocol import AdapterError, Port
from gxpo_conformance.suggest import did_you_mean

BUNDLED = "gxpo_conformance.adapters.torch:Port"
EMPTY = (
    "the value is empty, so that no port is named; probably a variable is not set. Name the port, or leave the option "
    "out to judge the bundled gxpo.py"
)
NO_TORCH = (
    "no port is named, and the bundled gxpo.py, which is judged then, needs torch: name your port by --impl "
    "MODULE:ATTRIBUTE or --exec COMMAND, or run `pip install torch`"
)


def load(impl: str | None = None, command: str | None = None, time_limit: float = 30.0) -> Port:
    """The adapter `impl` ("module:attribute", called without arguments), or a process started by `command`; the
    bundled gxpo.py where both are None. AdapterError says what went wrong on the way."""
    for option, value in (("--impl", impl), ("--exec", command)):
        if value is not None and not value.strip():
            raise AdapterError(f"{option}: {EMPTY}")
    if impl and command:
        raise AdapterError(f"name one port: --impl {impl} or --exec {command!r}, not both")
    if command:
        return StdioPort(command, time_limit)
    named = (impl or BUNDLED).strip()
    module, _, attribute = named.partition(":")
    if not module or not attribute:
        hint = f"; did you mean {named.removesuffix('.py')}:Port?" if named.endswith(".py") else ""
        raise AdapterError(f"--impl must be module:attribute (my_port.adapter:Port, say), got {impl!r}{hint}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a port in the folder one stands in
    try:
        with interrupt.insist(), contextlib.redirect_stdout(sys.stderr):  # what a port prints is not part of a report
            port = instance(importlib.import_module(module), attribute, named)
    except AdapterError:
        raise
    except BaseException as error:  # SystemExit as well, and whatever else a module may raise
        if interrupt.is_the_users(error):
            raise
        if impl is None and getattr(error, "name", None) == "torch":
            raise AdapterError(NO_TORCH) from None
        raise AdapterError(f"--impl {named}: {why(error, module)}") from error
    require_port(port, named)
    return port


def instance(module: Any, attribute: str, named: str) -> Any:
    """The port that a module's attribute gives when it is called."""
    if not hasattr(module, attribute):
        there = [name for name in dir(module) if not name.startswith("_")]
        near = did_you_mean(attribute, there)
        raise AdapterError(f"--impl {named}: AttributeError: {module.__name__} has no {attribute!r}{near}")
    make = getattr(module, attribute)
    if not callable(make):
        raise AdapterError(
            f"--impl {named}: this is a {type(make).__name__}, and cannot be called; name the class of the port, or a "
            "function without arguments that returns one"
        )
    return make()


def why(error: BaseException, module: str) -> str:
    """What came of importing or calling it, and what to do about it."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        return f"{said}: it ended the program when it was loaded; put what it runs under `if __name__ == '__main__':`"
    if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
        return f"{said}; is {module.split('.')[0]} in the folder that you run this in, or installed?"
    if isinstance(error, TypeError) and "argument" in str(error):
        return f"{said}; the adapter is called without arguments: give them defaults, or name a function that does it"
    return said


def require_port(port: Any, named: str) -> None:
    """AdapterError where the object lacks what protocol.Port has."""
    missing = [f"{name}()" for name in ("capabilities", "start") if not callable(getattr(port, name, None))]
    if not has_name(port):
        missing.append("name")
    if missing:
        raise AdapterError(
            f"--impl {named}: calling it gives a {type(port).__name__}, which has no {', '.join(missing)}: it is not "
            "an adapter (PORTING.md, section 3, has one to start from)"
        )


def has_name(port: Any) -> bool:
    """Whether there is one; a name that cannot be read for another reason is Trial's to tell."""
    try:
        return hasattr(port, "name")
    except Exception:
        return True
