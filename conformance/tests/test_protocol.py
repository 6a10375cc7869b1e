"""If these fail, a port of protocol 1 is judged by something that it was never told, one of 1.1 is not told what it
needs, or STDIO.md promises what is not so."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from port_commands import fake_port, served

from gxpo_conformance.process.stdio import StdioPort
from gxpo_conformance.protocol import (
    CAPABILITIES,
    CORE,
    AdapterError,
    Arrays,
    check_capabilities,
    config,
    declares,
    everything,
)
from gxpo_conformance.wire import from_wire, to_wire
from gxpo_reference import oracle as definition

PAGE = resources.files("gxpo_conformance").joinpath("STDIO.md").read_text(encoding="utf-8")
ORACLE = served("gxpo_conformance.adapters.oracle:Port")
BARE = {**{key: [enough[0]] for key, enough in CORE.items()}, "dtypes": ["float64"], "devices": ["cpu"]}
BARE["optimizer_state"] = ["keep"]
SUPPLIED = 'CAPABILITIES["gate_statistics"].append("supplied")\n'
HEARD = """\
heard, said = open("heard.jsonl", "a"), sys.stdin
class Told:
    def readline(self):
        line = said.readline(); heard.write(line); heard.flush()
        return line
sys.stdin = Told()
"""


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a fake port has heard so far, message by message; it needs HEARD in its code."""
    monkeypatch.chdir(tmp_path)
    return lambda: [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text("utf-8").splitlines()]


def hello(answer: dict[str, Any]) -> str:
    """Code of a fake port that greets with `answer` beside its name."""
    text = json.dumps(answer)
    return f'def on_hello(m): say({{"name": "fake", "capabilities": CAPABILITIES, **json.loads({text!r})}})'


# ------------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("answer", "spoken"),
    [({}, "1"), ({"protocol": 1}, "1"), ({"protocol": "1"}, "1"), ({"protocol": "1.1"}, "1.1")],
)
def test_both_protocols_are_spoken(answer: dict[str, Any], spoken: str, tmp_path: Path) -> None:
    """Every port that was right under protocol 1 would have to be written anew."""
    with StdioPort(fake_port(tmp_path, hello(answer)), 5.0) as port:
        assert port.protocol == spoken
        port.start({"w": np.zeros(1)}, config()).step(lambda params: (0.0, params))


@pytest.mark.parametrize("chosen", [2, "2", "1.10", 1.1, True, None, ["1.1"]])
def test_a_protocol_that_was_not_offered_is_told(chosen: Any, tmp_path: Path) -> None:
    """The port would be judged in words that it does not use, and be found wrong for that."""
    with pytest.raises(AdapterError, match='answered hello with a "protocol" that is not "1" or "1.1"'):
        StdioPort(fake_port(tmp_path, hello({"protocol": chosen})), 5.0)


def test_a_port_that_refuses_hello_says_why(tmp_path: Path) -> None:
    """An adapter whose capabilities() raises: its author needs the words of its exception."""
    with pytest.raises(AdapterError, match=r'the port refused "hello": RuntimeError: no licence found'):
        StdioPort(
            fake_port(tmp_path, 'def on_hello(m): say({"error": "RuntimeError: no licence found" + " here" * 30})'), 5.0
        )


def test_a_supplied_statistic_needs_words_for_it(tmp_path: Path) -> None:
    """The port would wait for a number that never comes, and its gate would be found wrong."""
    with pytest.raises(AdapterError, match='answer hello with "protocol": "1.1"'):
        StdioPort(fake_port(tmp_path, SUPPLIED), 5.0)
    StdioPort(fake_port(tmp_path, SUPPLIED + hello({"protocol": "1.1"})), 5.0).close()


def test_the_statistic_comes_with_each_step_that_has_one_and_with_no_other(tmp_path: Path, heard: Any) -> None:
    """A strict port would refuse a key that it does not know; a gate without its number decides by chance."""
    with StdioPort(fake_port(tmp_path, HEARD + SUPPLIED + hello({"protocol": "1.1"})), 5.0) as port:
        session = port.start({"w": np.zeros(1)}, config())
        session.step(lambda params: (0.0, params))
        session.step(lambda params: (0.0, params), statistic=0.7)
    steps = [m for m in heard() if m.get("op") == "step"]
    assert steps == [{"op": "step", "session": 1}, {"op": "step", "session": 1, "statistic": 0.7}]


def test_a_gate_trips_on_what_is_supplied() -> None:
    """The paper's own gate watches the policy's entropy: a port's would be judged without ever having seen it."""
    made = config(gate={"statistic": "supplied", "window": 2})
    with StdioPort(ORACLE, 30.0) as port:
        session, passes = port.start({"w": np.ones(2)}, made), []
        for n, entropy in enumerate([1.0, 1.1, 5.0, 1.0]):

            def grad(params: Arrays, n: int = n) -> tuple[float, Arrays]:
                passes.append(n)
                return 0.5, {"w": np.array([1.0, -0.5])}

            session.step(grad, statistic=entropy)
    assert passes == [0] * 3 + [1] * 3 + [2] * 3 + [3]


# --------------------------------------------------------------------------------------------------------- declarations


def test_what_declares_everything_is_taken_as_it_is() -> None:
    """Ports declare {**everything(), ...}: a key more or less, and they would be judged by something else."""
    assert check_capabilities(everything()) == everything()
    assert check_capabilities(BARE).keys() == CAPABILITIES.keys()


@pytest.mark.parametrize(
    ("said", "gradients", "losses"),
    [
        ({"nonfinite": True}, True, True),
        ({"nonfinite": False}, False, False),
        ({"nonfinite": False, "nonfinite_gradients": True}, True, False),
        ({"nonfinite": True, "nonfinite_losses": False}, True, False),
        ({"nonfinite_gradients": True}, True, False),
    ],
)
def test_the_former_word_means_both(said: dict[str, bool], gradients: bool, losses: bool) -> None:
    """A port of 1.0 would no longer be tested where it said that it is right."""
    checked = check_capabilities(BARE | said)
    assert (checked["nonfinite_gradients"], checked["nonfinite_losses"]) == (gradients, losses)


def test_a_bad_former_word_is_named_as_it_was_written() -> None:
    with pytest.raises(AdapterError, match=r"capabilities\(\)\['nonfinite'\] must be true or false, got 1"):
        check_capabilities(BARE | {"nonfinite": 1})


def test_ema_may_be_the_only_baseline() -> None:
    """The authors' own code has it alone, and is right."""
    assert check_capabilities(BARE | {"gate_baselines": ["ema"]})["gate_baselines"] == ["ema"]
    with pytest.raises(AdapterError, match=r"\['gate_baselines'\] must hold 'window' or 'ema', the core; got \[\]"):
        check_capabilities(BARE | {"gate_baselines": []})


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, False),
        ({"gate_baselines": ["ema"]}, False),
        ({"dtypes": ["float64", "float32"], "devices": ["cpu", "cuda"]}, False),
        ({"optimizers": ["sgd", "sgd"]}, False),
        ({"optimizer_state": ["keep", "restore"]}, True),
        ({"gate_options": ["patience"]}, True),
        ({"exceptions": True}, True),
    ],
)
def test_whether_there_are_options(more: dict[str, Any], options: bool) -> None:
    """The random runs over options would have nothing to draw from, or a port's options would not be in them."""
    assert declares(check_capabilities(BARE | more), "options") is options


def test_in_process_is_the_suites_to_say() -> None:
    """What only an adapter in the suite's own process can do wrong would be asked of a program, which cannot."""
    assert declares(check_capabilities(BARE), "in process")
    assert not declares(check_capabilities(BARE) | {"in process": False}, "in process")
    with pytest.raises(AdapterError, match="unknown key 'in process'"):
        check_capabilities(BARE | {"in process": True})


# ----------------------------------------------------------------------------------------------- what STDIO.md promises


def test_every_key_of_the_configuration_is_on_the_page_with_its_choices() -> None:
    """AdamW's were not, and whoever writes a port from the page alone had to guess them."""
    section = PAGE.split("## The configuration")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", section, re.M))
    sent = set()
    for name in ("sgd", "adamw"):
        made = config(optimizer={"name": name})
        sent |= made.keys() - {"gate", "optimizer"}
        sent |= {f"{part}.{key}" for part in ("gate", "optimizer") for key in made[part]}
    assert table.keys() == sent
    known = definition.CONFIG | {f"gate.{key}": bound for key, bound in definition.GATE.items()}
    known |= {f"optimizer.{key}": bound for key, bound in definition.OPTIMIZER.items()}
    choices = {key: set(bound) for key, bound in known.items() if isinstance(bound, tuple)}
    assert {key: set(re.findall(r'"(\w+)"', table[key])) for key in choices} == choices


def test_the_suite_says_what_the_page_shows(tmp_path: Path, heard: Any) -> None:
    """People write their reader from the page's lines."""
    shown = next(t for t in re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S) if t.startswith("> "))
    lines = [json.loads(line[2:]) for line in re.sub(r"\n {4}", " ", shown).splitlines() if line[0] == ">"]
    with StdioPort(fake_port(tmp_path, HEARD), 5.0) as port:
        session = port.start({"w": np.array([0.5, -1.25])}, config(horizon=3, alpha=0.5))
        given = iter(lines[3:6])
        session.step(lambda params: (lambda m: (m["loss"], from_wire(m["grads"])))(next(given)))
        session.params()
    assert heard() == [*lines[:5], *lines[6:]]  # the fake asks for two gradients, not three


def test_a_session_is_closed_when_nobody_needs_it(tmp_path: Path, heard: Any) -> None:
    """A port's memory would grow by every session of a run."""
    with StdioPort(fake_port(tmp_path, HEARD), 5.0) as port:
        for _ in range(3):
            port.start({"w": np.zeros(1)}, config())
    assert [(m["op"], m.get("session")) for m in heard()[1:-1]] == [
        ("start", 1),
        ("close", 1),
        ("start", 2),
        ("close", 2),
        ("start", 3),
    ]


def test_how_a_port_ends_after_bye_is_its_own_affair(tmp_path: Path) -> None:
    """Many runtimes end with something else than 0 when their pipes go; nothing was wrong until then."""
    with StdioPort(fake_port(tmp_path, "import atexit; atexit.register(os._exit, 5)"), 5.0) as port:
        process = port.process
        assert process is not None
    assert process.popen.returncode == 5


def test_the_command_is_split_as_a_shell_would_and_no_shell_runs_it(tmp_path: Path) -> None:
    """A path with a space in it would be two arguments, and a $ in one would be taken for a variable."""
    code = 'def on_hello(m): say({"name": json.dumps(sys.argv[1:]), "capabilities": CAPABILITIES})'
    with StdioPort(fake_port(tmp_path, code) + ' "two words" $HOME', 5.0) as port:
        assert port.name == '["two words", "$HOME"]'


def test_bfloat16_travels_as_float32(tmp_path: Path, heard: Any) -> None:
    """A port would be sent numbers of a type that numpy and JSON do not have."""
    with StdioPort(fake_port(tmp_path, HEARD), 5.0) as port:
        session = port.start({"w": np.array([1.5], np.float32)}, config(), dtype="bfloat16")
        assert session.params()["w"].dtype == np.float32
    assert heard()[1]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "digits"), [(np.float32, 9), (np.float64, 17)])
def test_nine_and_seventeen_digits_suffice(kind: type, digits: int) -> None:
    """A port that prints so many would be found to round."""
    values = np.random.default_rng(3).standard_normal(4000) * 10.0 ** np.arange(-20, 20).repeat(100)
    exact = values.astype(kind)
    sent = {"w": {"shape": [4000], "data": [float(f"{v:.{digits}g}") for v in exact.tolist()]}}
    np.testing.assert_array_equal(from_wire(sent, kind)["w"], exact)


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), -0.0, float("inf")], [1e-310, -2.0, 3e300]])
def test_arrays_come_back_as_they_were_sent(values: list[float]) -> None:
    """The fast way for thousands of numbers would be another than the one for what is not finite."""
    sent = json.loads(json.dumps(to_wire({"w": np.array(values), "s": np.array(0.25)}), allow_nan=False))
    back = from_wire(sent)
    np.testing.assert_array_equal(back["w"], np.array(values))
    assert back["s"].shape == ()


def test_a_truth_value_is_no_number() -> None:
    """true would be 1 without anybody having meant it."""
    with pytest.raises(ValueError, match="must be a JSON number"):
        from_wire({"w": {"shape": [2], "data": [1.0, True]}})
