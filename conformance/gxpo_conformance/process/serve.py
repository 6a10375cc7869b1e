"""Puts an in-process adapter behind the JSON-lines protocol: python -m gxpo_conformance.process.serve my_port:Port

For a Python port that lives in another virtual environment, or that may crash or hang: the suite then runs it with
gxpo-conformance --exec "python -m gxpo_conformance.process.serve my_port:Port". Also an example of the other side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import AdapterError, Arrays, Port
from gxpo_conformance.wire import dumps, from_wire, parse_number, to_wire


class Raised(Exception):
    """The loss failed, at the other end."""


class Server:
    """Answers one request after another until `bye`."""

    def __init__(self, port: Port, source: IO[str], out: IO[str]) -> None:
        self.port, self.source, self.out = port, source, out
        self.sessions: dict[int, Any] = {}
        self.kept: list[Any] = []  # what save() gave: any Python object, which need not have a form in JSON
        self.kinds: dict[int, type] = {}

    def run(self) -> None:
        while (message := self.hear()) and message.get("op") != "bye":
            try:
                answer = getattr(self, f"on_{message['op']}")(message)
            except Exception as error:
                if message.get("op") == "start":  # an "error" there means that the config is refused: this is a crash
                    raise
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.say(answer)

    def hear(self) -> dict[str, Any] | None:
        line = self.source.readline()
        return json.loads(line) if line else None

    def say(self, message: dict[str, Any]) -> None:
        try:
            line = dumps(message)
        except (TypeError, ValueError) as error:  # capabilities() may hold anything
            line = dumps({"error": f"{', '.join(message)} cannot be written as JSON: {error}"})
        self.out.write(line + "\n")
        self.out.flush()

    def on_hello(self, message: dict[str, Any]) -> dict[str, Any]:
        hello = {"name": str(self.port.name), "version": "", "capabilities": self.port.capabilities()}
        return {**hello, "protocol": "1.1"} if "1.1" in message.get("offers", ()) else hello

    def on_start(self, message: dict[str, Any]) -> dict[str, Any]:
        kind = np.float64 if message["dtype"] == "float64" else np.float32
        where = {"dtype": message["dtype"], "device": message["device"]}
        try:
            session = self.port.start(from_wire(message["params"], kind), message["config"], **where)
        except ValueError as error:
            return {"error": str(error)}
        self.sessions[message["session"]], self.kinds[message["session"]] = session, kind
        return {"ok": True}

    def on_step(self, message: dict[str, Any]) -> dict[str, Any]:
        kind = self.kinds[message["session"]]

        def grad(params: Arrays) -> tuple[float, Arrays]:
            self.say({"ask": to_wire(params)})
            answer = self.hear()
            if answer is None:
                raise SystemExit(0)
            if "raise" in answer:
                raise Raised(answer["raise"])
            return parse_number(answer["loss"]), from_wire(answer["grads"], kind)

        supplied = {"statistic": parse_number(message["statistic"])} if "statistic" in message else {}
        try:
            self.sessions[message["session"]].step(grad, **supplied)
        except Exception as error:
            return {"raised": told(error)}
        return {"done": True}

    def on_params(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"params": to_wire(self.sessions[message["session"]].params())}

    def on_save(self, message: dict[str, Any]) -> dict[str, Any]:
        self.kept.append(self.sessions[message["session"]].save())
        return {"saved": len(self.kept) - 1}

    def on_load(self, message: dict[str, Any]) -> dict[str, Any]:
        self.sessions[message["session"]].load(self.kept[message["saved"]])
        return {"ok": True}

    def on_close(self, message: dict[str, Any]) -> dict[str, Any]:
        del self.sessions[message["session"]]
        return {"ok": True}


def told(error: Exception) -> str:
    """An exception with what it was made of, for a port may wrap the loss's own, which has to be found again."""
    chain = dict.fromkeys(e for e in (error, error.__cause__, error.__context__) if e is not None)
    return "; ".join(str(e) if isinstance(e, Raised) else f"{type(e).__name__}: {e}" for e in chain)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gxpo_conformance.process.serve",
        description="Put an in-process adapter behind the JSON-lines protocol, on standard input and output.",
    )
    parser.add_argument("impl", metavar="MODULE:ATTRIBUTE", help="the adapter, called without arguments")
    options = parser.parse_args(arguments)
    source = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the port prints must not get between the lines,
    sys.stdout = sys.stderr
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # nor may it, or what it starts, take any of them
    os.close(nothing)
    try:
        port = load(options.impl)
    except AdapterError as error:
        sys.exit(str(error))
    with source, out:
        Server(port, source, out).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
