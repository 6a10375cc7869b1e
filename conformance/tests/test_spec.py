"""If these fail, SPEC.md says one thing and the suite runs another, or a clause's number has changed its meaning."""

from __future__ import annotations

import re

import pytest

import gxpo
from gxpo_conformance.clauses.table import CHECKS, GROUPS, SPEC, SPEC_VERSION, clauses
from gxpo_conformance.protocol import config


def test_every_clause_has_a_check_and_every_check_a_clause() -> None:
    assert set(CHECKS) == set(clauses())
    assert {c[:3] for c in clauses()} == set(GROUPS)
    for check in CHECKS.values():
        assert set(check.leans) <= set(clauses())


def test_every_clause_says_where_it_is_seen() -> None:
    """What cannot be observed cannot be a clause."""
    assert all(c.seen_at and c.rule.endswith(".") for c in clauses().values())


def test_no_number_is_given_twice_or_again() -> None:
    """A verdict of last year must still mean what it said."""
    rows = re.findall(r"^\| ([A-Z]{3}-\d\d) \|", SPEC, re.M)
    assert len(rows) == len(set(rows)) == len(clauses())
    retired = re.search(r"^\*\*Retired numbers\*\*: (.*)$", SPEC, re.M)
    assert not set(re.findall(r"[A-Z]{3}-\d\d", retired[1])) & set(rows)


def test_every_clause_has_its_reason_and_source() -> None:
    """A rule that nobody can justify is one that nobody can change."""
    reasons = SPEC.split("## Reasons")[1]
    for low, high in re.findall(r"\*?\*?([A-Z]{3}-\d\d)\*?\*? to \*?\*?(?:[A-Z]{3}-)?(\d\d)", reasons):
        reasons += " ".join(f"{low[:3]}-{n:02d}" for n in range(int(low[4:]), int(high) + 1))
    whole_groups = {"INV", "TOY"}  # one paragraph for all of the group
    missing = [c for c in clauses() if c not in reasons and c[:3] not in whole_groups]
    assert missing == []


def test_gxpo_py_follows_this_spec() -> None:
    """A pasted copy names the version that it follows."""
    assert gxpo.SPEC_VERSION == SPEC_VERSION == "1.1"


def test_clause_numbers_in_gxpo_py_exist() -> None:
    with open(gxpo.__file__, encoding="utf-8") as file:
        cited = set(re.findall(r"\b[A-Z]{3}-\d\d\b", file.read()))
    assert cited
    assert cited <= set(clauses())


def test_a_config_holds_every_key() -> None:
    made = config(gate={"patience": 2}, optimizer={"name": "adamw"})
    assert made["gate"].keys() == {
        "statistic", "baseline", "window", "omega", "threshold", "patience", "two_sided", "warmup", "cooldown",
        "max_active_steps",
    }  # fmt: skip
    assert made["optimizer"].keys() == {"name", "lr", "betas", "eps", "weight_decay"}
    with pytest.raises(KeyError, match="no such key in a config"):
        config(horizont=3)
