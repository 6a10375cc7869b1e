"""If these fail, right ports are judged otherwise behind the protocol than in process, or STDIO.md is wrong."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from fewer_runs import few_runs
from port_commands import judged, served

from gxpo_conformance.process import load, pipes
from gxpo_conformance.protocol import AdapterError
from gxpo_conformance.trial import Verdict, judge

PAGE = resources.files("gxpo_conformance").joinpath("STDIO.md").read_text(encoding="utf-8")
ORACLE = served("gxpo_conformance.adapters.oracle:Port")


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Verdict]]:
    """(code of an adapter, clauses) -> its verdicts, in process and behind the protocol. `code` stands in a module that
    has the oracle's adapter as `oracle_adapter`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "adapter_of_a_test", raising=False)

    def verdicts(code: str, only: str) -> list[Verdict]:
        text = "from gxpo_conformance.adapters import oracle as oracle_adapter\n" + textwrap.dedent(code)
        (tmp_path / "adapter_of_a_test.py").write_text(text, encoding="utf-8")
        named = "adapter_of_a_test:Port"
        return [judge(load.load(named), only=only.split(",")), judged(served(named), 30.0, only)]

    return verdicts


@pytest.mark.parametrize("wrap", ["raise ValueError('wrapped') from error", "raise ValueError('wrapped')"])
def test_an_adapter_may_wrap_the_losss_exception(wrap: str, both: Callable[..., list[Verdict]]) -> None:
    """It passes ATM-01 in process; behind the protocol it has to as well."""
    wrapping = f"""\
        class Session(oracle_adapter.Session):
            def step(self, grad, **given):
                try:
                    super().step(grad, **given)
                except Exception as error:
                    {wrap}
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                return Session(super().start(*given, **where).oracle)
        """
    for verdict in both(wrapping, "ATM-01,ATM-02,ATM-03"):
        assert verdict.failed == []


def test_an_adapter_behind_the_protocol_is_judged_as_it_is_in_process() -> None:
    with few_runs():
        verdict = judged(ORACLE, 30.0, only="")
    assert verdict.exit_status == 0
    assert verdict.words == "conformant (core + the declared options)"


def test_an_adapter_that_prints_and_reads_does_not_get_between_the_lines(both: Callable[..., list[Verdict]]) -> None:
    """What its framework says while loading, and what a compiler that it starts finds on its standard input."""
    chatty = """\
        import subprocess, sys
        print("loading")
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                print("starting", flush=True)
                subprocess.run([sys.executable, "-S", "-E", "-c", "print(input())"], stderr=subprocess.DEVNULL)
                return super().start(*given, **where)
        """
    assert both(chatty, "OPT-01")[1].failed == []


def test_the_order_of_names_and_the_sign_of_zero_are_free(both: Callable[..., list[Verdict]]) -> None:
    """A port that keeps its tensors in a sorted map would be wrong, or would have its tensors mixed up."""
    reversing = """\
        def backwards(arrays):
            return {k: arrays[k] + 0.0 for k in reversed(arrays)}
        class Session(oracle_adapter.Session):
            def step(self, grad, **given):
                super().step(lambda params: grad(backwards(params)), **given)
            def params(self):
                return {k: v + 0.0 * v for k, v in backwards(super().params()).items()}
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                return Session(super().start(*given, **where).oracle)
        """
    for verdict in both(reversing, "INV-07,INV-08,DEV-01,CKP-01,CKP-04,EST-03"):
        assert verdict.failed == []
        assert len(verdict.which("pass")) >= 6


def test_what_save_gives_need_not_have_a_form_in_json(both: Callable[..., list[Verdict]]) -> None:
    """An adapter that saves a closure, or a lock beside its arrays, is right in process."""
    closing = """\
        class Session(oracle_adapter.Session):
            def save(self):
                saved = super().save()
                return lambda: saved
            def load(self, saved):
                super().load(saved())
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                return Session(super().start(*given, **where).oracle)
        """
    for verdict in both(closing, "CKP-01,CKP-04"):
        assert verdict.failed == []


def test_a_save_that_follows_the_session_is_found_behind_the_protocol_too(both: Callable[..., list[Verdict]]) -> None:
    """Written down at once it would be right by accident: a trainer that writes later saves something else."""
    live = """\
        class Session(oracle_adapter.Session):
            def save(self):
                return self.oracle
            def load(self, saved):
                super().load(saved.save())
        class Port(oracle_adapter.Port):
            def start(self, *given, **where):
                return Session(super().start(*given, **where).oracle)
        """
    for verdict in both(live, "CKP-01"):
        assert verdict.failed == ["CKP-01"]


# What an adapter of a few lines may lack -> (code, clauses, what the finding says in process, and behind the protocol)
SESSION = "class Session(oracle_adapter.Session):\n    {}\nclass Port(oracle_adapter.Port):\n    {}\n"
RETURNS = "def start(self, *given, **where): return Session(super().start(*given, **where).oracle)"
SLIPS = {
    "start returns nothing": (
        SESSION.format("pass", "def start(self, *given, **where): super().start(*given, **where)"),
        *("OPT-01", "start() gives None", "'NoneType' object has no attribute 'params'"),
    ),
    "start breaks": (
        SESSION.format(
            "pass", "def start(self, p, c, **w): return super().start(p, c, **w) if c['horizon'] > 1 else 1 + ''"
        ),
        *("EXT-06", "start() raised TypeError", 'ended with exit status 1 in place of an answer to "start"'),
    ),
    "save is missing": (
        SESSION.format("save = property()", RETURNS),
        *("CKP-01", "save() raised AttributeError", 'refused "save": AttributeError'),
    ),
    "load is missing": (
        SESSION.format("load = property()", RETURNS),
        *("CKP-01", "load() raised AttributeError", 'refused "load": AttributeError'),
    ),
    "params gives nothing": (
        SESSION.format("def params(self): pass", RETURNS),
        *("OPT-01", "params() gives tensors NoneType", 'refused "params": AttributeError'),
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_an_adapter_is_a_finding(slip: str, both: Callable[..., list[Verdict]]) -> None:
    """A stack trace of the suite in its place would lose the run; a crash in start() would pass for a refusal."""
    code, only, *messages = SLIPS[slip]
    for verdict, message in zip(both(code, only), messages, strict=True):
        (found, *_) = [r for r in verdict.every() if r.verdict == "fail"]
        assert message in found.message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def capabilities(self): return ['float64']", "capabilities() must return a dict, got list"),
        ("def capabilities(self): raise RuntimeError('no licence')", "no licence"),
        ("def capabilities(self): return {'dtypes': {'float64'}}", "dtypes"),
        ("name = property()", "name"),
    ],
)
def test_a_declaration_that_is_none_is_told_before_a_verdict(
    code: str, message: str, both: Callable[..., list[Verdict]], tmp_path: Path
) -> None:
    """Exit status 2 and the reason, in place of a stack trace of the suite."""
    with pytest.raises(AdapterError, match="(?s)" + re.escape(message)):
        both(SESSION.format("pass", code), "OPT-01")
    with pytest.raises(AdapterError, match="(?s)" + re.escape(message if message != "dtypes" else "capabilities")):
        judged(served("adapter_of_a_test:Port"), 30.0)


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
    with few_runs():
        verdict = judged(f"{sys.executable} {tmp_path / 'my_port.py'}", 30.0, only="")
    assert verdict.exit_status == 0
    assert verdict.count("OPTION", "pass") == verdict.declared > 0


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
