"""Ctrl-C: told apart from a KeyboardInterrupt that a port raises itself, and not lost where a port swallows it.

`listening` is put around a command. The first Ctrl-C raises Interrupted, wherever the run is, inside a port as well.
A port may catch it, or make another exception of it; `insist`, around every request to a port, brings it out all the
same. The second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

STATUS = 130  # of a command that Ctrl-C ended: 128 and the signal's number, as shells have it


class Interrupted(KeyboardInterrupt):
    """The user's Ctrl-C."""


class State:
    """Of this process: a signal comes to a process, not to an object in it."""

    listening = False
    came = False
    held = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Ctrl-C raises Interrupted inside. Elsewhere than in the main thread it stays what it is."""
    if State.listening or threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(*_: object) -> None:
        if State.came:
            os._exit(STATUS)
        State.came = True
        if not State.held:
            raise Interrupted

    handler = signal.signal(signal.SIGINT, heard)
    State.listening, State.came = True, False
    try:
        yield
    finally:
        State.listening, State.came = False, False
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """The first Ctrl-C inside changes nothing: what is being written comes to its end. The second ends all."""
    State.held = True
    try:
        yield
    finally:
        State.held = False


def came() -> bool:
    """Whether the user has asked for the end of the command in progress."""
    return State.came


def is_the_users(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt is the user's. Where nothing listens (pytest, a notebook) it is taken for the user's,
    for there it cannot be told."""
    return isinstance(error, KeyboardInterrupt) and (State.came or not State.listening)


@contextlib.contextmanager
def insist() -> Iterator[None]:
    """Raises Interrupted at the end where the user's Ctrl-C came inside and something else came out, or nothing."""
    try:
        yield
    except BaseException:
        if State.came and not State.held:
            raise Interrupted from None
        raise
    if State.came and not State.held:
        raise Interrupted
