"""Ports in processes of their own, most of them misbehaving: each is a finding with the port's last words, never a
stack trace of the suite, never a stuck run, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from port_commands import fake_port, judged

from gxpo_conformance import cli
from gxpo_conformance.process import pipes, stdio
from gxpo_conformance.process.load import load
from gxpo_conformance.protocol import AdapterError, PortError, config


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """code -> the command of a fake port with that code in it."""

    return partial(fake_port, tmp_path)


MISBEHAVIOUR = {  # what it does -> (code, what the finding says)
    "exits": ('def on_step(m): words("out of cheese"); os._exit(3)', "ended with exit status 3 in place of an answer"),
    "is killed": ('def on_step(m): words("out of cheese"); os.kill(os.getpid(), 11)', "was ended by SIGSEGV"),
    "hangs": ('def on_step(m): words("out of cheese"); time.sleep(60)', 'did not answer "step" within 1.5 s'),
    "ignores SIGTERM": (
        'signal.signal(15, signal.SIG_IGN)\ndef on_step(m): words("out of cheese"); time.sleep(60)',
        'did not answer "step" within 1.5 s',
    ),
    "stops reading": (
        'def on_step(m):\n words("out of cheese")\n say({"ask": params[m["session"]]})\n time.sleep(60)',
        'did not answer "loss" within 1.5 s',
    ),
    "closes its output": (
        'def on_step(m): words("out of cheese"); os.close(1); time.sleep(60)',
        "closed its standard output in place of an answer",
    ),
    "writes rubbish": (
        'def on_step(m): words("out of cheese"); say("hello there")',
        "not a JSON object: 'hello there'",
    ),
    "writes a list": ('def on_step(m): words("out of cheese"); say([1])', "not a JSON object: '[1]'"),
    "writes no UTF-8": (
        'def on_step(m): words("out of cheese"); os.write(1, b"\\xff\\xfe\\n")',
        "not a JSON object",
    ),
    "writes NaN without quotes": (
        'def on_params(m): words("out of cheese"); say(\'{"params": {"w": {"shape": [1], "data": [NaN]}}}\')',
        'NaN is not JSON, "NaN" in quotes stands for it',
    ),
    "writes more than a double holds": (
        'def on_params(m): words("out of cheese"); say(\'{"params": {"w": {"shape": [1], "data": [1e999]}}}\')',
        "'1e999' is more than a double holds",
    ),
    "writes an endless integer": (
        'def on_params(m): words("out of cheese"); say("9" * 10**6)',
        """not a JSON object: '9999""",
    ),
    "ends in the middle of a line": (
        'def on_step(m): words("out of cheese"); os.write(1, b\'{"ask\'); os._exit(3)',
        """ended with exit status 3 in place of an answer to "step", in the middle of a line: '{"ask'""",
    ),
    "closes its input": (
        'def on_step(m):\n words("out of cheese")\n os.close(0)\n say({"ask": params[1]})\n time.sleep(60)',
        'did not answer "loss" within 1.5 s, having closed its standard input',
    ),
    "nests deeply": ('def on_step(m): words("out of cheese"); say("[" * 200000)', "not a JSON object: '[[["),
    "answers what was not asked": (
        'def on_step(m): words("out of cheese"); say({"ok": 1})',
        "answered a step with: {'ok': 1}",
    ),
    "speaks out of turn": (
        'def on_step(m):\n words("out of cheese")\n os.write(1, b\'{"done": true}\\n{"done": true}\\n\')',
        """spoke out of turn: '{"done": true}'""",
    ),
    "asks at rubbish": (
        'def on_step(m): words("out of cheese"); say({"ask": {"w": 3}})',
        "asked for a gradient at what is not",
    ),
    "asks at too few numbers": (
        'def on_step(m): words("out of cheese"); say({"ask": {"w": {"shape": [8], "data": [1]}}})',
        "asked for a gradient at what is not arrays",
    ),
    "asks at huge numbers": (
        'def on_step(m): words("out of cheese"); say({"ask": {"w": {"shape": [1], "data": [10**4000]}}})',
        "asked for a gradient at what is not arrays",
    ),
    "refuses": (
        'def on_params(m): words("out of cheese"); say({"error": "no idea"})',
        'refused "params": no idea',
    ),
    "gives no params": ('def on_params(m): words("out of cheese"); say({})', "answered \"params\" without 'params'"),
}


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_a_port_that_misbehaves_is_a_finding_with_its_last_words(what: str, fake: Any) -> None:
    """Its author has to learn what happened from the report, and the run has to come to an end."""
    code, message = MISBEHAVIOUR[what]
    verdict = judged(fake(code), time_limit=1.5)
    found = verdict.results["OPT-01"]["float64"]
    assert verdict.failed == ["OPT-01"]
    assert message in found.message
    if what != "refuses":  # it lives, and said why
        assert "its last words: out of cheese" in found.message
    assert found.finding.crash or what == "refuses"
    assert "Error(" not in found.message  # of the suite's own


def test_wrong_shapes_and_dtypes_over_the_wire_are_findings(fake: Any) -> None:
    verdict = judged(fake('def on_step(m): say({"ask": {"v": {"shape": [1], "data": [1.0]}}})'))
    assert "at tensors ['v'], not ['w']" in verdict.results["OPT-01"]["float64"].message
    verdict = judged(fake('def on_params(m): say({"params": {"w": {"shape": [1], "data": ["NaN"]}}})'))
    assert "params() gives 'w' of shape and dtype ((1,)" in verdict.results["OPT-01"]["float64"].message


def test_a_flood_on_standard_error_neither_blocks_nor_fills_memory(fake: Any) -> None:
    """Progress bars and debug logs are megabytes."""
    flood = 'def on_step(m):\n for _ in range(300): os.write(2, b"x" * 65536)\n words("the end"); os._exit(1)'
    found = judged(fake(flood)).results["OPT-01"]["float64"].message
    assert found.endswith("xxxthe end")
    assert len(found) < 3 * pipes.LAST_WORDS


def test_a_flood_without_end_does_not_hold_the_run(fake: Any) -> None:
    found = judged(fake('def on_step(m):\n while True: os.write(2, b"x" * 65536)'), time_limit=1.5)
    assert 'did not answer "step" within 1.5 s' in found.results["OPT-01"]["float64"].message


def test_a_line_of_a_hundred_megabytes_is_not_read_to_its_end(fake: Any) -> None:
    long = 'def on_step(m):\n for _ in range(1600): os.write(1, b"x" * 65536)\n say("")'
    assert "a line of more than 16 MiB" in judged(fake(long), 20.0).results["OPT-01"]["float64"].message


def test_a_port_that_never_reads_cannot_block_the_suite(fake: Any) -> None:
    """A full pipe blocks whoever writes into it, for ever, unless writing ends with the time limit as well."""
    port = load(None, fake("def on_start(m): time.sleep(60)"), 1.5)
    with port, pytest.raises(PortError, match='did not answer "start" within 1.5 s'):
        port.start({"w": np.zeros(200_000)}, config())


def test_a_port_that_answers_unread_requests_is_told(fake: Any) -> None:
    """It would be judged by answers to questions that it has not seen."""
    code = 'def on_hello(m):\n say({"name": "x", "capabilities": CAPABILITIES})\n say({"ok": True})\n time.sleep(60)'
    port = load(None, fake(code), 5.0)
    with port, pytest.raises(PortError, match="spoke out of turn|before it had read all of it"):
        port.start({"w": np.zeros(200_000)}, config())


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ("NaN", "True", "NaN is not JSON"),  # could not be sent back
        ("1", "False", 'answered "load" with an "ok" that is not true'),
    ],
)
def test_a_checkpoint_that_is_not_one_is_told(saved: str, loaded: str, message: str, fake: Any) -> None:
    """A run that is resumed would go on from something else, and nobody would have been told."""
    code = f'def on_save(m): say(\'{{"saved": {saved}}}\')\ndef on_load(m): say({{"ok": {loaded}}})'
    with load(None, fake(code), 5.0) as port:
        session = port.start({"w": np.zeros(1)}, config())
        with pytest.raises(PortError, match=message):
            session.load(session.save())
        assert port.process is None


def test_a_checkpoint_of_any_depth_is_taken_or_told(fake: Any) -> None:
    """Where reading and writing JSON give up at different depths, a stack trace of the suite would come out."""
    code = """\
        def on_save(m): say('{"saved": ' + "[" * m["session"] + "]" * m["session"] + "}")
        def on_load(m): say({"ok": True})
        """
    with load(None, fake(code), 5.0) as port:
        for depth in range(sys.getrecursionlimit() - 110, sys.getrecursionlimit() - 20):
            port.sessions = depth - 1
            session = port.start({"w": np.zeros(1)}, config())
            with contextlib.suppress(PortError):
                session.load(session.save())


def test_a_step_that_is_interrupted_ends_the_process(fake: Any) -> None:
    """After Ctrl-C the port still waits for its gradient, and would take the next request for one."""
    with load(None, fake(), 5.0) as port:

        def grad(params: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            port.start({"w": np.zeros(1)}, config()).step(grad)
        assert port.process is None
        port.start({"w": np.zeros(1)}, config()).params()


def test_a_grandchild_that_holds_the_pipes_does_not_hold_the_suite(fake: Any) -> None:
    """A port that starts a server and dies: the pipes stay open, in a session of their own. Taken for a port that hangs
    it would cost the time limit each time, and the third would block the rest of the run."""
    code = """\
        import subprocess
        def on_step(m):
            subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(8)"], start_new_session=True)
            words("out of cheese")
            os._exit(7)
        """
    found = judged(fake(code), time_limit=5.0).results["OPT-01"]["float64"]
    assert 'ended with exit status 7 in place of an answer to "step"; its last words: out of cheese' in found.message
    assert not found.finding.timed_out


def test_what_a_port_started_ends_with_it(fake: Any, tmp_path: Path) -> None:
    code = f"""\
        import subprocess
        child = subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        """
    load(None, fake(code), 5.0).close()
    with contextlib.suppress(ProcessLookupError):  # it may have gone for good already
        watch = select.poll()
        watch.register(os.pidfd_open(int((tmp_path / "pid").read_text())), select.POLLIN)
        assert watch.poll(5000), "still running"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            'words("no licence"); sys.exit(4)',
            'ended with exit status 4 in place of an answer to "hello"; its last words',
        ),
        ('def on_hello(m): say({"name": "x"})', 'answered hello without "name" (a text) and "capabilities"'),
        ('def on_hello(m): say("Welcome!")', "not a JSON object: 'Welcome!'"),
        ("def on_hello(m): time.sleep(60)", 'did not answer "hello" within 1.5 s'),
        ('CAPABILITIES["dtypes"] = ["float16"]', "capabilities()['dtypes'] must be a list out of"),
    ],
)
def test_a_port_that_cannot_be_greeted_is_a_broken_adapter(code: str, message: str, fake: Any, capsys: Any) -> None:
    assert cli.main(["--exec", fake(code), "--time-limit", "1.5"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["/no/such/program", "", "'unclosed"])
def test_a_command_that_cannot_be_started_is_told(command: str) -> None:
    with pytest.raises(AdapterError, match=r"cannot start|the port"):
        stdio.StdioPort(command, 1.5)


def test_it_is_started_anew_after_a_crash(fake: Any) -> None:
    """One crash must cost one clause, not the eighty that follow."""
    code = 'def on_step(m):\n if len(params) > 1: os._exit(1)\n say({"done": True})'
    port = load(None, fake(code), 5.0)
    with port:
        first, second = (port.start({"w": np.zeros(1)}, config()) for _ in range(2))
        with pytest.raises(PortError, match="ended with exit status 1"):
            second.step(lambda params: (0.0, params))
        with pytest.raises(PortError, match="session 1 is gone with its process"):
            first.params()
        port.start({"w": np.zeros(1)}, config()).step(lambda params: (0.0, params))


def test_nothing_is_left_behind(fake: Any) -> None:
    """Fifty restarts in a run must not use up file descriptors, threads or processes."""
    command = fake("def on_step(m): os._exit(1)")

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    port = load(None, command, 5.0)
    before = open_files(), threading.active_count()
    for _ in range(50):
        with pytest.raises(PortError):
            port.start({"w": np.zeros(1)}, config()).step(lambda params: (0.0, params))
    port.start({"w": np.zeros(1)}, config())
    assert (open_files(), threading.active_count()) == before
    pid = port.process.popen.pid
    port.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # a zombie would still be there


def test_what_the_loss_raises_comes_out(fake: Any) -> None:
    """A trainer's out-of-memory must reach the trainer, not a paraphrase of it."""
    code = """\
        def on_step(m):
            say({"ask": params[m["session"]]})
            say({"raised": json.loads(sys.stdin.readline())["raise"]})
        """
    with load(None, fake(code), 5.0) as port:
        error = MemoryError("out of it")

        def grad(params: Any) -> Any:
            raise error

        with pytest.raises(MemoryError) as raised:
            port.start({"w": np.zeros(1)}, config()).step(grad)
        assert raised.value is error


def test_another_failure_in_place_of_the_losss_is_told(fake: Any) -> None:
    """A port that loses the loss's exception would pass ATM-01 for having had some exception."""
    code = """\
        def on_step(m):
            say({"ask": params[m["session"]]})
            sys.stdin.readline()
            say({"raised": "gone wrong"})
        """

    def grad(params: Any) -> Any:
        raise MemoryError("out of it")

    with load(None, fake(code), 5.0) as port, pytest.raises(RuntimeError, match="^gone wrong$"):
        port.start({"w": np.zeros(1)}, config()).step(grad)


def test_what_a_port_raises_itself_comes_out(fake: Any) -> None:
    """Its author reads it in the report."""
    for key in ("raised", "error"):
        found = judged(fake(f'def on_step(m): say({{"{key}": "no such kernel"}})')).results["OPT-01"]["float64"].message
        assert "the port's step raised RuntimeError('no such kernel')" in found


def test_a_name_that_cannot_be_printed_is_printed(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a character in a port's name would end the command with a stack trace of the suite."""
    code = "def on_hello(m): say({'name': 'half \\ud800', 'capabilities': CAPABILITIES})"
    assert cli.main(["smoke", "--exec", fake(code), "--time-limit", "5"]) in (1, 2)
    printed = capsys.readouterr()
    assert "half \\ud800 on cpu" in printed.out
    assert "Traceback" not in printed.err
