"""A port in a process of its own, spoken to in JSON lines (STDIO.md has the protocol).

Whatever the process does, crash, hang, write rubbish, talk out of turn, is a PortError with its last words; it is then
ended, with all that it started, and the next session starts it anew.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np

from gxpo_conformance.harness.findings import Failure
from gxpo_conformance.harness.harness import TIME_LIMIT
from gxpo_conformance.process.pipes import Message, Process, about, as_text
from gxpo_conformance.protocol import AdapterError, Arrays, Config, Gradient, PortError
from gxpo_conformance.wire import from_wire, number, shortened, to_wire

PROTOCOL = 1  # what every port has been told from the first; a number, so that one which compares it goes on working
OFFERS = ("1", "1.1")  # what it may choose from; 1 where it chooses nothing


class StdioPort:
    """A port behind `command`. Implements protocol.Port; AdapterError where it cannot be started or greeted.

    time_limit: seconds for each answer.
    """

    in_process = False  # what only a port in the suite's own process can do wrong is not asked

    def __init__(self, command: str, time_limit: float = TIME_LIMIT) -> None:
        self.command, self.time_limit = command, time_limit
        self.process: Process | None = None
        self.sessions = 0
        self.left: list[int] = []  # sessions that nobody holds any more, to be closed
        try:
            hello = self.greet()
        except PortError as error:
            raise AdapterError(str(error)) from error
        self.name = " ".join(as_text(hello[key]) for key in ("name", "version") if hello.get(key))
        self.declared = hello["capabilities"]
        statistics = self.declared.get("gate_statistics") if isinstance(self.declared, dict) else None
        if self.protocol == "1" and isinstance(statistics, list) and "supplied" in statistics:
            self.end()
            raise AdapterError(
                'the port declares the gate statistic "supplied", which protocol 1 has no words for: answer hello with '
                '"protocol": "1.1", and read "statistic" from each step of such a session'
            )

    def greet(self) -> Message:
        self.process = Process(self.command, self.time_limit)
        hello = self.request({"op": "hello", "protocol": PROTOCOL, "offers": OFFERS})
        if "error" in hello:
            self.end()
            raise PortError(f'the port refused "hello": {as_text(hello["error"])}')
        if not isinstance(hello.get("name"), str) or "capabilities" not in hello:
            raise self.broken('answered hello without "name" (a text) and "capabilities"', hello)
        chosen = hello.get("protocol", PROTOCOL)
        self.protocol = "1" if chosen == PROTOCOL and not isinstance(chosen, bool) else chosen
        if self.protocol not in OFFERS:
            offered = " or ".join(f'"{offer}"' for offer in OFFERS)
            raise self.broken(f'answered hello with a "protocol" that is not {offered}, the texts offered', chosen)
        return hello

    def capabilities(self) -> dict[str, Any]:
        return self.declared

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> StdioSession:
        if self.process is None:
            self.greet()
        while self.left:
            self.agree({"op": "close", "session": self.left.pop()})
        self.sessions += 1
        message = {"op": "start", "session": self.sessions, "dtype": dtype, "device": device}
        answer = self.request({**message, "config": config, "params": to_wire(params)})
        if "error" in answer:
            raise ValueError(as_text(answer["error"]))
        if answer.get("ok") is not True:
            raise self.broken("answered start with", answer)
        return StdioSession(self, self.sessions, np.float64 if dtype == "float64" else np.float32)

    def request(self, message: Message) -> Message:
        """Say something, and the answer to it."""
        if self.process is None:
            raise PortError("the port's process has been ended")
        try:
            self.process.say(message)
            return self.process.hear(message)
        except BaseException:  # an interrupt as well: half a conversation cannot be gone on with
            self.end()
            raise

    def expect(self, message: Message, key: str) -> Any:
        """The value of `key` in the answer. PortError where there is none."""
        answer = self.request(message)
        if "error" in answer:
            raise PortError(f"the port refused {about(message)}: {as_text(answer['error'])}")
        if key not in answer:
            raise self.broken(f"answered {about(message)} without {key!r}", answer)
        return answer[key]

    def agree(self, message: Message) -> None:
        """PortError where the answer is not {"ok": true}."""
        if (ok := self.expect(message, "ok")) is not True:
            raise self.broken(f'answered {about(message)} with an "ok" that is not true', ok)

    def broken(self, what: str, answer: Any) -> PortError:
        """What to raise for an answer that does not fit; the process is ended."""
        words = self.process.last_words() if self.process else ""
        self.end()
        return PortError(f"the port {what}: {shortened(answer)}{words}")

    def end(self) -> None:
        """The process and all its sessions are gone; the next start() begins anew."""
        if self.process is not None:
            self.process.kill()
        self.process = None
        self.left.clear()

    def close(self) -> None:
        """Say goodbye and let the process go."""
        if self.process is not None:
            with contextlib.suppress(PortError):
                self.process.leave()
        self.end()

    def __enter__(self) -> StdioPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StdioSession:
    """One session of the process. Implements protocol.Session."""

    def __init__(self, port: StdioPort, number: int, kind: type) -> None:
        assert port.process is not None  # it has just answered
        self.port, self.number, self.kind, self.process = port, number, kind, port.process
        weakref.finalize(self, leave, weakref.ref(port), number, weakref.ref(self.process))

    def message(self, op: str, **more: Any) -> Message:
        if self.process is not self.port.process:
            raise PortError(f"the port was started anew, and session {self.number} is gone with its process")
        return {"op": op, "session": self.number, **more}

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        message = self.message("step", **({} if statistic is None else {"statistic": number(statistic)}))
        answer, raised = self.port.request(message), None
        while "ask" in answer:
            try:
                loss, grads = grad(self.arrays(answer["ask"], "asked for a gradient at"))
                reply = {"loss": number(loss), "grads": to_wire(grads)}
            except BaseException as error:
                if isinstance(error, Failure | PortError) or not isinstance(error, Exception):
                    self.port.end()  # in the middle of a step, and in disorder
                    raise
                raised, reply = error, {"raise": reason(error)}
            answer = self.port.request(reply)
        if "raised" in answer:
            text = as_text(answer["raised"])
            if raised and as_text(reason(raised)) in text:  # the loss's own failure, and no other in its place
                raise raised
            raise RuntimeError(text)
        if "error" in answer:
            raise RuntimeError(as_text(answer["error"]))
        if answer.get("done") is not True:
            raise self.port.broken("answered a step with", answer)

    def params(self) -> Arrays:
        return self.arrays(self.port.expect(self.message("params"), "params"), "answered params with")

    def save(self) -> Any:
        return self.port.expect(self.message("save"), "saved")

    def load(self, saved: Any) -> None:
        self.port.agree(self.message("load", saved=saved))

    def arrays(self, sent: Any, what: str) -> Arrays:
        try:
            return from_wire(sent, self.kind)
        except (ValueError, OverflowError) as error:  # an integer may be more than a double holds
            raise self.port.broken(f"{what} what is not arrays ({as_text(str(error))})", sent) from error


def reason(error: Exception) -> str:
    """An exception as it travels."""
    return str(error) or type(error).__name__


def leave(port: weakref.ref[StdioPort], number: int, process: weakref.ref[Process]) -> None:
    """A session that nobody holds: its port closes it before it starts another."""
    alive, its = port(), process()
    if alive is not None and its is not None and alive.process is its:
        alive.left.append(number)
