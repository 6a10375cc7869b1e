"""A process that answers one JSON object a line: its pipes, its time limit, its last words, its end."""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import time
from typing import IO, Any, NoReturn

from gxpo_conformance.protocol import PortError
from gxpo_conformance.wire import dumps, shortened

LONGEST_LINE = 16 * 2**20  # bytes; sixty-four coordinates need a few thousand
LAST_WORDS = 2000  # characters of standard error that are kept
TICK = 0.1  # seconds between two looks at whether the process is still there
Message = dict[str, Any]


class Process:
    """The process and its three pipes, none of which ever blocks: writing, too, ends with the time limit.

    One thread, so that nothing is left behind when a grandchild keeps a pipe open. Needs pipes that can be polled, as
    on Linux and macOS.
    """

    def __init__(self, command: str, time_limit: float) -> None:
        self.time_limit = time_limit
        if os.name == "nt":
            raise PortError("a port in a process of its own needs Linux, macOS or the like; on Windows use WSL")
        self.selector = selectors.DefaultSelector()
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
            self.selector.close()
            raise PortError(f"cannot start {command!r}: {error}") from error
        atexit.register(self.kill)
        stdin, stdout, stderr = self.popen.stdin, self.popen.stdout, self.popen.stderr
        assert stdin is not None  # pipes were asked for
        assert stdout is not None
        assert stderr is not None
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        for pipe, react in ((stdout, self.read_line), (stderr, self.read_words)):
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, react)
        os.set_blocking(stdin.fileno(), False)
        self.outgoing, self.words, self.deaf = b"", b"", False
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
        try:
            self.outgoing = self.outgoing[os.write(pipe.fileno(), self.outgoing) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more: hear() says why
            self.outgoing, self.deaf = b"", True
        if not self.outgoing:
            self.selector.unregister(pipe)

    def read(self, pipe: IO[bytes]) -> bytes:
        try:
            chunk = os.read(pipe.fileno(), 2**16)
        except BlockingIOError:  # nothing there after all
            return b""
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
            self.fail(f"spoke out of turn: {beginning(self.lines[0])}")
        try:
            text = dumps(message)
        except RecursionError:
            self.fail(f"saved what is nested too deep to be sent back in {about(message)}")
        if not self.outgoing and not self.listening(self.stdin):
            self.selector.register(self.stdin, selectors.EVENT_WRITE, self.write)
        self.outgoing += text.encode() + b"\n"

    def hear(self, message: Message) -> Message:
        """The answer to `message`. PortError where it does not come or is not one JSON object."""
        end = time.monotonic() + self.time_limit
        while not self.lines:
            left = end - time.monotonic()
            if left <= 0:
                deaf = ", having closed its standard input" if self.deaf else ""
                self.fail(f"did not answer {about(message)} within {self.time_limit:g} s{deaf}", timed_out=True)
            if not self.listening(self.stdout) or (not self.pump(min(left, TICK)) and self.has_ended()):
                cut = f", in the middle of a line: {beginning(b''.join(self.pending))}" if self.held else ""
                self.fail(f"{self.fate()} in place of an answer to {about(message)}{cut}")
        line = self.lines.popleft()
        if self.outgoing:
            self.fail(f"answered {about(message)} before it had read all of it: {beginning(line)}")
        if len(line) > LONGEST_LINE:
            self.fail(f"answered {about(message)} with a line of more than {LONGEST_LINE >> 20} MiB: {beginning(line)}")
        try:
            return parse(line)
        except ValueError as error:
            why = as_text(str(error))
        self.fail(f"answered {about(message)} with what is not a JSON object: {beginning(line)} ({why})")

    def fail(self, what: str, timed_out: bool = False) -> NoReturn:
        raise PortError(f"the port {what}{self.last_words()}", timed_out)

    def has_ended(self) -> bool:
        """Whether it is gone and all that it said is read, though a child of its may hold its output open."""
        return self.popen.poll() is not None and not self.pump(0)

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
        """What it said last on standard error, as the end of a message. Of its output no more is read."""
        if self.listening(self.stdout):
            self.selector.unregister(self.stdout)  # a flood of it would only fill memory
        end = time.monotonic() + 0.5  # a port that goes on talking, or a grandchild, is not waited for
        while self.listening(self.stderr) and time.monotonic() < end and self.pump(0.05):
            pass
        words = self.words.decode(errors="replace").strip()
        return f"; its last words: {words}" if words else "; it said nothing on standard error"

    def leave(self) -> None:
        """Say goodbye, and give it two seconds to go."""
        self.say({"op": "bye"})
        end = time.monotonic() + 2.0
        while self.popen.poll() is None and time.monotonic() < end:  # its pipes may outlive it, in a child's hands
            self.pump(0.02)
            self.lines.clear()

    def kill(self) -> None:
        """End it and all that it started."""
        atexit.unregister(self.kill)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where all are dead already
            os.killpg(self.popen.pid, signal.SIGKILL)  # also where the process has ended and its children have not
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self.popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver: not even SIGKILL ends it now
            self.popen.wait(timeout=5.0)
        self.selector.close()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def parse(line: bytes) -> Message:
    """One JSON object. ValueError for all else, also for what json lets pass: NaN, 1e999."""
    try:
        answer = json.loads(line.decode(), parse_constant=no_number, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(answer, dict):
        raise ValueError(f"a {type(answer).__name__}")
    return answer


def no_number(text: str) -> NoReturn:
    raise ValueError(f'{text} is not JSON, "{text}" in quotes stands for it')


def finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{shortened(text)} is more than a double holds")
    return value


def as_text(value: Any) -> str:
    """What a port gave as a text, fit to be told: not endless, and without half characters, which nothing prints."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = "something nested too deep to be shown"
    return text[:LAST_WORDS].encode(errors="backslashreplace").decode()


def beginning(line: bytes) -> str:
    return shortened(line[:200].decode(errors="replace"))


def about(message: Message) -> str:
    """A message as it is told of: what it asks, not its numbers."""
    return f'"{message["op"]}"' if "op" in message else f'"{next(iter(message))}"'
