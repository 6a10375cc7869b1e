"""If these fail, right ports are judged otherwise behind the protocol than in process, or STDIO.md is wrong."""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from importlib import resources
from pathlib import Path

import pytest
from port_commands import judged

from gxpo_conformance.process import pipes

PAGE = resources.files("gxpo_conformance").joinpath("STDIO.md").read_text(encoding="utf-8")
ORACLE = f"{shlex.quote(sys.executable)} -m gxpo_conformance.process.serve gxpo_conformance.adapters.oracle:Port"


@pytest.mark.parametrize("wrap", ["raise ValueError('wrapped') from error", "raise ValueError('wrapped')"])
def test_an_adapter_may_wrap_the_losss_exception(wrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes ATM-01 in process; behind the protocol it has to as well."""
    wrapping = f"""\
        from gxpo_conformance.adapters import oracle as oracle_adapter
        class Session(oracle_adapter.Session):
            def step(self, grad):
                try:
                    super().step(grad)
                except Exception as error:
                    {wrap}
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                return Session(super().start(*given, **where).oracle)
        """
    (tmp_path / "wrapping.py").write_text(textwrap.dedent(wrapping), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    served = f"{shlex.quote(sys.executable)} -m gxpo_conformance.process.serve wrapping:Port"
    assert judged(served, 30.0, only="ATM").failed == []


def test_an_adapter_behind_the_protocol_is_judged_as_it_is_in_process() -> None:
    verdict = judged(ORACLE, 30.0, only="")
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"


def test_an_adapter_that_prints_does_not_get_between_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = """\
        from gxpo_conformance.adapters import oracle as oracle_adapter
        print("loading")
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                print("starting", flush=True)
                return super().start(*given, **where)
        """
    (tmp_path / "chatty.py").write_text(textwrap.dedent(chatty), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert judged(f"{sys.executable} -m gxpo_conformance.process.serve chatty:Port", 30.0).failed == []


# ------------------------------------------------------------------------------------------------------------- STDIO.md

MY_GXPO = """\
import numpy as np
from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.wire import from_wire, to_wire

class Refused(Exception): pass

class GXPO:
    def __init__(self, theta, config):
        try:
            self.session = oracle_adapter.Port().start(from_wire(theta, np.float64), config)
        except ValueError as error:
            raise Refused(error) from error
    def step(self, gradient):
        def grad(params):
            loss, grads = gradient(to_wire(params))
            return loss, from_wire(grads, np.float64)
        self.session.step(grad)
    @property
    def theta(self):
        return to_wire(self.session.params())
"""


def test_the_skeleton_on_the_page_is_a_port(tmp_path: Path) -> None:
    """People paste it. Behind it stands the oracle in place of their own method."""
    (skeleton,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / "my_port.py").write_text(skeleton, encoding="utf-8")
    (tmp_path / "my_gxpo.py").write_text(MY_GXPO, encoding="utf-8")
    verdict = judged(f"{sys.executable} {tmp_path / 'my_port.py'}", 30.0, only="")
    assert verdict.exit_status == 0
    assert verdict.count("OPTION", "pass") == verdict.declared == 4


def test_the_conversation_on_the_page_is_what_a_right_port_says() -> None:
    shown = next(t for t in re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S) if t.startswith("> "))
    lines = re.sub(r"\n {4}", " ", shown).splitlines()
    said = [json.loads(line[2:]) for line in lines if line[0] == ">"]
    answered = [json.loads(line[2:]) for line in lines if line[0] == "<"]
    spoken = pipes.Process(ORACLE, 30.0)
    try:
        for message, answer in zip(said, answered, strict=False):
            spoken.say(message)
            heard = spoken.hear(message)
            if message.get("op") != "hello":  # there each names itself
                assert heard == answer
    finally:
        spoken.kill()
