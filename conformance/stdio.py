"""A port in a process of its own, spoken to in JSON lines (STDIO.md has the protocol).

Whatever the process does, crash, hang, write rubbish, talk out of turn, is a PortError with its last words; it is then
ended, with all that it started, and the next session starts it anew.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import weakref
from typing import IO, Any

import numpy as np

from gxpo_conformance.bench import TIME_LIMIT, Failure
from gxpo_conformance.protocol import AdapterError, Arrays, Config, Gradient, PortError
from gxpo_conformance.wire import dumps, from_wire, number, shortened, to_wire

PROTOCOL = 1
LONGEST_LINE = 16 * 2**20  # bytes; sixty-four coordinates need a few thousand
LAST_WORDS = 2000  # characters of standard error that are kept
Message = dict[str, Any]


class StdioPort:
    """A port behind `command`. Implements protocol.Port; AdapterError where it cannot be started or greeted.

    time_limit: seconds for each answer.
    """

    def __init__(self, command: str, time_limit: float = TIME_LIMIT) -> None:
        self.command, self.time_limit = command, time_limit
        self.process: Process | None = None
        self.sessions = 0
        self.left: list[int] = []  # sessions that nobody holds any more, to be closed
        try:
            hello = self.greet()
        except PortError as error:
            raise AdapterError(str(error)) from error
        self.name = " ".join(str(hello[key]) for key in ("name", "version") if hello.get(key))
        self.declared = hello["capabilities"]

    def greet(self) -> Message:
        self.process = Process(self.command, self.time_limit)
        hello = self.request({"op": "hello", "protocol": PROTOCOL})
        if not isinstance(hello.get("name"), str) or "capabilities" not in hello:
            raise self.broken('answered hello without "name" and "capabilities"', hello)
        return hello

    def capabilities(self) -> dict[str, Any]:
        return self.declared

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> StdioSession:
        if self.process is None:
            self.greet()
        while self.left:
            self.expect({"op": "close", "session": self.left.pop()}, "ok")
        self.sessions += 1
        message = {"op": "start", "session": self.sessions, "dtype": dtype, "device": device}
        answer = self.request({**message, "config": config, "params": to_wire(params)})
        if "error" in answer:
            raise ValueError(str(answer["error"]))
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
        except PortError:
            self.end()
            raise

    def expect(self, message: Message, key: str) -> Any:
        """The value of `key` in the answer. PortError where there is none."""
        answer = self.request(message)
        if "error" in answer:
            raise PortError(f"the port refused {about(message)}: {shortened(answer['error'])}")
        if key not in answer:
            raise self.broken(f"answered {about(message)} without {key!r}", answer)
        return answer[key]

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
                self.process.say({"op": "bye"})
                self.process.wait(2.0)
        self.end()

    def __enter__(self) -> StdioPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StdioSession:
    """One session of the process. Implements protocol.Session."""

    def __init__(self, port: StdioPort, number: int, kind: type) -> None:
        self.port, self.number, self.kind, self.process = port, number, kind, port.process
        weakref.finalize(self, leave, weakref.ref(port), number, weakref.ref(port.process))

    def message(self, op: str, **more: Any) -> Message:
        if self.process is not self.port.process:
            raise PortError(f"the port was started anew, and session {self.number} is gone with its process")
        return {"op": op, "session": self.number, **more}

    def step(self, grad: Gradient) -> None:
        message = self.message("step")
        answer, raised = self.port.request(message), None
        while "ask" in answer:
            try:
                loss, grads = grad(self.arrays(answer["ask"], "asked for a gradient at"))
                reply = {"loss": number(loss), "grads": to_wire(grads)}
            except (Failure, PortError):
                self.port.end()  # in the middle of a step, and in disorder
                raise
            except Exception as error:
                raised, reply = error, {"raise": str(error) or type(error).__name__}
            answer = self.port.request(reply)
        if "raised" in answer:
            raise raised or RuntimeError(str(answer["raised"]))
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        if answer.get("done") is not True:
            raise self.port.broken("answered a step with", answer)

    def params(self) -> Arrays:
        return self.arrays(self.port.expect(self.message("params"), "params"), "answered params with")

    def save(self) -> Any:
        return self.port.expect(self.message("save"), "saved")

    def load(self, saved: Any) -> None:
        self.port.expect(self.message("load", saved=saved), "ok")

    def arrays(self, sent: Any, what: str) -> Arrays:
        try:
            return from_wire(sent, self.kind)
        except (ValueError, OverflowError) as error:
            raise self.port.broken(f"{what} what is not arrays ({error})", sent) from error


def leave(port: weakref.ref, number: int, process: weakref.ref) -> None:
    """A session that nobody holds: its port closes it before it starts another."""
    if port() is not None and process() is not None and port().process is process():
        port().left.append(number)


class Process:
    """The process and its three pipes."""

    def __init__(self, command: str, time_limit: float) -> None:
        self.time_limit = time_limit
        try:
            self.popen = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that what it starts ends with it
            )
        except (OSError, ValueError) as error:
            raise PortError(f"cannot start {command!r}: {error}") from error
        self.lines: queue.Queue[bytes | None] = queue.Queue(maxsize=4)  # a port that floods it is made to wait
        self.words, self.ending = b"", threading.Event()
        self.threads = [
            threading.Thread(target=target, args=(pipe,), daemon=True)
            for target, pipe in ((self.read_lines, self.popen.stdout), (self.read_words, self.popen.stderr))
        ]
        for thread in self.threads:
            thread.start()
        atexit.register(self.kill)

    def read_lines(self, pipe: IO[bytes]) -> None:
        pending = b""
        while chunk := os.read(pipe.fileno(), 2**16):
            *whole, pending = (pending + chunk).split(b"\n") if b"\n" in chunk else (pending + chunk,)
            for line in whole:
                self.put(line)
            if len(pending) > LONGEST_LINE:
                self.put(pending)  # told from its length; the rest of it is not read
                return
        self.put(None)

    def put(self, line: bytes | None) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(queue.Full):
                self.lines.put(line, timeout=0.2)
                return

    def read_words(self, pipe: IO[bytes]) -> None:
        while chunk := os.read(pipe.fileno(), 2**16):
            self.words = (self.words + chunk)[-LAST_WORDS:]

    def say(self, message: Message) -> None:
        if not self.lines.empty() and (line := self.lines.get_nowait()) is not None:
            raise PortError(
                f"the port spoke out of turn: {shortened(line.decode(errors='replace'))}{self.last_words()}"
            )
        try:
            self.popen.stdin.write(dumps(message).encode() + b"\n")
            self.popen.stdin.flush()
        except OSError:  # it has died: hear() says how
            pass

    def hear(self, message: Message) -> Message:
        """The answer to `message`. PortError where it does not come or is not one JSON object."""
        try:
            line = self.lines.get(timeout=self.time_limit)
        except queue.Empty:
            text = f"the port did not answer {about(message)} within {self.time_limit:g} s"
            raise PortError(text + self.last_words()) from None
        if line is None:
            raise PortError(f"the port {self.fate()} in place of an answer to {about(message)}{self.last_words()}")
        if len(line) > LONGEST_LINE:
            raise PortError(f"the port answered {about(message)} with a line of more than {LONGEST_LINE >> 20} MiB")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            text = shortened(line.decode(errors="replace"))
            raise PortError(
                f"the port answered {about(message)} with what is not a JSON object: {text}{self.last_words()}"
            )
        return answer

    def fate(self) -> str:
        """How it ended, as far as is known."""
        try:
            status = self.popen.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its standard output"
        if status >= 0:
            return f"ended with exit status {status}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
        return f"was ended by signal {-status}"

    def last_words(self) -> str:
        """What it said last on standard error, as the end of a message."""
        if self.popen.poll() is not None:
            self.threads[1].join(timeout=1.0)  # all that it said is on its way
        words = self.words.decode(errors="replace").strip()
        return f"; its last words: {words}" if words else "; it said nothing on standard error"

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=seconds)

    def kill(self) -> None:
        """End it and all that it started."""
        atexit.unregister(self.kill)
        self.ending.set()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.popen.pid, signal.SIGKILL)
            else:
                self.popen.kill()
        self.popen.wait()
        for thread in self.threads:
            thread.join(timeout=2.0)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def about(message: Message) -> str:
    """A message as it is told of: what it asks, not its numbers."""
    return f'"{message["op"]}"' if "op" in message else f'"{next(iter(message))}"'
