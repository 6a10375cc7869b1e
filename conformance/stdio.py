"""A port in a process of its own, spoken to in JSON lines (STDIO.md has the protocol).

Whatever the process does, crash, hang, write rubbish, talk out of turn, is a PortError with its last words; it is then
ended, with all that it started, and the next session starts it anew.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import time
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
                self.process.leave()
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
    """The process and its three pipes, none of which ever blocks: writing, too, ends with the time limit.

    One thread, so that nothing is left behind when a grandchild keeps a pipe open. Needs pipes that can be polled, as
    on Linux and macOS.
    """

    def __init__(self, command: str, time_limit: float) -> None:
        self.time_limit = time_limit
        try:
            self.popen = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # so that what it starts ends with it
            )
        except (OSError, ValueError, IndexError) as error:
            raise PortError(f"cannot start {command!r}: {error}") from error
        atexit.register(self.kill)
        self.selector = selectors.DefaultSelector()
        for pipe, react in ((self.popen.stdout, self.read_line), (self.popen.stderr, self.read_words)):
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, react)
        os.set_blocking(self.popen.stdin.fileno(), False)
        self.outgoing, self.words = b"", b""
        self.lines: collections.deque[bytes] = collections.deque()
        self.pending: list[bytes] = []  # of a line that has not ended
        self.held = 0  # bytes of it

    # -- the pipes

    def pump(self, seconds: float) -> bool:
        """Wait for one of the pipes and serve it; False where none was ready in time."""
        events = self.selector.select(max(0.0, seconds))
        for key, _ in events:
            key.data(key.fileobj)
        return bool(events)

    def listening(self, pipe: IO[bytes]) -> bool:
        return pipe in self.selector.get_map()

    def write(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                self.outgoing = self.outgoing[os.write(pipe.fileno(), self.outgoing) :]
            except OSError:  # it has died: hear() says how
                self.outgoing = b""
        if not self.outgoing:
            self.selector.unregister(pipe)

    def read(self, pipe: IO[bytes]) -> bytes:
        chunk = os.read(pipe.fileno(), 2**16)
        if not chunk:
            self.selector.unregister(pipe)
        return chunk

    def read_line(self, pipe: IO[bytes]) -> None:
        *whole, rest = self.read(pipe).split(b"\n")
        for line in whole:
            self.lines.append(b"".join((*self.pending, line)))
            self.pending, self.held = [], 0
        self.pending.append(rest)
        self.held += len(rest)
        if self.held > LONGEST_LINE:  # told from its length; the rest of it is not read
            self.lines.append(b"".join(self.pending))
            self.selector.unregister(pipe)

    def read_words(self, pipe: IO[bytes]) -> None:
        self.words = (self.words + self.read(pipe))[-LAST_WORDS:]

    # -- the conversation

    def say(self, message: Message) -> None:
        self.pump(0)
        if self.lines:
            words = shortened(self.lines[0].decode(errors="replace"))
            raise PortError(f"the port spoke out of turn: {words}{self.last_words()}")
        if not self.outgoing and self.popen.stdin not in self.selector.get_map():
            self.selector.register(self.popen.stdin, selectors.EVENT_WRITE, self.write)
        self.outgoing += dumps(message).encode() + b"\n"

    def hear(self, message: Message) -> Message:
        """The answer to `message`. PortError where it does not come or is not one JSON object."""
        end = time.monotonic() + self.time_limit
        while not self.lines and self.listening(self.popen.stdout):
            left = end - time.monotonic()
            if left <= 0:
                text = f"the port did not answer {about(message)} within {self.time_limit:g} s"
                raise PortError(text + self.last_words())
            self.pump(left)
        if not self.lines:
            raise PortError(f"the port {self.fate()} in place of an answer to {about(message)}{self.last_words()}")
        line = self.lines.popleft()
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
        end = time.monotonic() + 0.5  # a port that goes on talking, or a grandchild, is not waited for
        while self.listening(self.popen.stderr) and time.monotonic() < end and self.pump(0.05):
            pass
        words = self.words.decode(errors="replace").strip()
        return f"; its last words: {words}" if words else "; it said nothing on standard error"

    def leave(self) -> None:
        """Say goodbye, and give it two seconds to go."""
        self.say({"op": "bye"})
        end = time.monotonic() + 2.0
        while self.popen.poll() is None and time.monotonic() < end:  # its pipes may outlive it, in a child's hands
            self.pump(0.02)

    def kill(self) -> None:
        """End it and all that it started."""
        atexit.unregister(self.kill)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.popen.pid, signal.SIGKILL)
            else:
                self.popen.kill()
        self.popen.wait()
        self.selector.close()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def about(message: Message) -> str:
    """A message as it is told of: what it asks, not its numbers."""
    return f'"{message["op"]}"' if "op" in message else f'"{next(iter(message))}"'
