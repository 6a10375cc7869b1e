"""The reports: what a reader, a CI server, a badge service and a browser are told about a run."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from fewer_runs import few_runs

from gxpo_conformance import cli
from gxpo_conformance.adapters import oracle as oracle_adapter
from gxpo_conformance.clauses.table import SPEC_VERSION, clauses
from gxpo_conformance.known import Known
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.mutants.nearest import Nearest
from gxpo_conformance.protocol import Arrays, Config
from gxpo_conformance.reports.badge import badge
from gxpo_conformance.reports.html import html, matrix_page
from gxpo_conformance.reports.junit import junit
from gxpo_conformance.reports.record import Record, records
from gxpo_conformance.reports.terminal import Terminal, summary
from gxpo_conformance.trial import VERDICTS, judge

HOSTILE = "</pre></details><script>alert(1)</script>\x00\x1b[31m\x85\u202e\ud800 ]]> --> {{ 7 * 191 }} &amp; \"'\r\n"
UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff\ufffe\uffff]")
NEAREST = MUTANTS["alpha-on-excess"]
COMMAND = " --exec 'node \"<b>my port</b>.js\"'"
MISTAKES = [
    {"id": id, "does": does, "source": "SFPO <1.0>", "style": "in place", "clauses": clauses, "kills": kills}
    for id, does, clauses, kills in (
        ("sample-deviation", "divides by `w` & <i>not</i>", ["GAT-03", "GAT-02"], {"float64": ["GAT-03"]}),
        (NEAREST.id, NEAREST.does, ["MOV-01"], {"float64": ["MOV-01", "INV-03"], "float32": ["MOV-01"]}),
    )
]
MATRIX = {"spec": "1.0", "mutants": MISTAKES}


class Raises(oracle_adapter.Port):
    """Has something to say, in its name and whenever it is asked for anything."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def start(
        self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu"
    ) -> oracle_adapter.Session:
        raise SaysError(self.text)


class SaysError(Exception):
    __repr__ = Exception.__str__  # repr() of a str escapes what the tests are about


HOSTILE_PORT = Raises(HOSTILE + "x" * 1000, HOSTILE + "long " * 200_000)


def reported(port: oracle_adapter.Port, **how: Any) -> list[Record]:
    verdict = judge(port, ["float64"], **how)
    return records(verdict, COMMAND, 0.5, Nearest(verdict))


def with_footer(found: list[Record], **changes: Any) -> list[Record]:
    """The same with counts that are right for what is in it."""
    *others, foot = copy.deepcopy(found)
    counts = {v: sum(r["verdict"] == v for r in others[1:]) for v in foot["counts"]}
    return [*others, {**foot, "counts": counts, "results": len(others) - 1, **changes}]


@pytest.fixture(scope="module")
def right() -> list[Record]:
    with few_runs():
        return reported(oracle_adapter.Port())


@pytest.fixture(scope="module")
def wrong() -> list[Record]:
    """A real run of a few clauses, and a result of every verdict that there is."""
    known = {c: Known(c, "a known <reason>", "https://example.org/7") for c in ("MOV-02", "EXT-06")}
    found = reported(NEAREST.port(), only=["MOV", "CST", "EXT-06", "EST-04"], known=known)
    about = of(found, "CST-01")
    blocked = {**about, "clause": "GAT-02", "verdict": "blocked", "message": "leans on <OPT-02>, which did not pass"}
    undeclared = {**about, "clause": "GAT-10", "verdict": "undeclared", "message": "needs gate_options:patience"}
    found = with_footer([*found[:-1], blocked, undeclared, found[-1]])
    assert all(found[-1]["counts"][v] for v in VERDICTS)
    return found


@pytest.fixture(scope="module")
def hostile() -> list[Record]:
    return reported(HOSTILE_PORT, only=["OPT-01", "EST-01"], known={"OPT-01": Known("OPT-01", HOSTILE, "javascript:x")})


def of(found: list[Record], clause: str) -> Record:
    return next(r for r in found if r.get("clause") == clause)


def whole(text: str) -> bool:
    """Whether a reader of the JSON lines may trust them, by the footer alone."""
    try:
        last = json.loads(text.splitlines()[-1])
    except (IndexError, ValueError):
        return False
    return last["record"] == "footer" and last["results"] == sum(last["counts"].values()) == text.count("\n") - 2


def test_a_report_that_was_cut_off_does_not_look_whole(wrong: list[Record]) -> None:
    """A run that was killed half-way would be read as one in which nothing more failed."""
    text = cli.FORMATS["json"](wrong)
    assert whole(text)
    ends = [n for n, sign in enumerate(text) if sign == "\n"]
    assert not any(whole(text[:cut]) for end in ends[:-1] for cut in (end // 2, end, end + 1))
    lines = text.splitlines(keepends=True)
    assert not any(whole("".join(lines[:n] + lines[n + 1 :])) for n in range(len(lines)))  # nor one that lost a line


def test_the_footer_counts_what_is_there(right: list[Record], hostile: list[Record]) -> None:
    """The headline would say something else than the lines above it."""
    for head, *results, foot in (right, hostile):
        assert (head["record"], foot["record"]) == ("header", "footer")
        assert foot["results"] == len(results) == sum(foot["counts"].values())
        assert foot["counts"] == {v: sum(r["verdict"] == v for r in results) for v in VERDICTS}
        words = r"\d+/\d+ MUST, \d+/\d+ declared options, \d+ not run(, \d+ known to fail)?"
        assert re.fullmatch(words, foot["headline"])
        assert head["versions"].keys() >= {"spec", "suite", "python", "numpy"}
        assert all(re.fullmatch("[0-9a-f]{64}", v) for v in head["vectors_sha256"].values())
    must = sum(c.level == "MUST" for c in clauses().values())
    assert right[-1]["headline"].startswith(f"{must}/{must} MUST, ")


def test_reports_are_fit_for_strict_readers(wrong: list[Record], hostile: list[Record]) -> None:
    """One control character, NaN or half a character in a port's last words would cost its author the whole report."""
    for found in (wrong, hostile):
        for line in cli.FORMATS["json"](found).splitlines():
            record = json.loads(line, parse_constant=pytest.fail)
            assert not UNREADABLE.search(json.dumps(record, ensure_ascii=False))
        assert not UNREADABLE.search(junit(found))
    (said,) = (f.text for f in ET.fromstring(junit(hostile)).iter("skipped") if f.text)
    assert "<script>alert(1)</script>" in said
    assert "characters left out" in said
    assert len(said) < 10_000


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_terminal_survives_a_port(encoding: str, hostile: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port could repaint the terminal to "conformant"; or its name would end the run in a UnicodeEncodeError."""
    out = io.BytesIO()
    stream = io.TextIOWrapper(out, encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        judge(HOSTILE_PORT, ["float64"], only=["OPT-01"], on_clause=Terminal())
        summary(hostile)
    text = out.getvalue().decode(encoding)
    assert not UNREADABLE.search(text)
    assert len(text) < 10_000
    assert f"GXPO {SPEC_VERSION}: {hostile[-1]['headline']}\n" in text
    assert text.endswith("; end of report\n")
    assert "%" not in text


def test_junit_counts_add_up(wrong: list[Record]) -> None:
    """A CI server would show fewer failures than there are, or take two results for one."""
    root, counts = ET.fromstring(junit(wrong)), wrong[-1]["counts"]
    suites = root.findall("testsuite")
    skipped = sum(counts[v] for v in ("known-fail", "blocked", "undeclared", "not run"))
    expected = {"failure": counts["fail"], "error": counts["error"], "skipped": skipped}
    assert int(root.get("tests")) == len(wrong) - 2
    for element in (root, *suites):
        for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(element.get(attribute)) == len(element.findall(f".//{tag}"))
            assert element is not root or int(element.get(attribute)) == expected[tag] > 0
        assert int(element.get("tests")) == len(element.findall(".//testcase"))
    assert [s.get("name") for s in suites] == ["float64 on cpu", "no dtype of this run"]


def test_one_clause_in_two_dtypes_is_two_junit_tests() -> None:
    """GitLab keeps one of several tests of the same class and name: a failure in float32 alone would be lost."""
    verdict = judge(NEAREST.port(), ["float64", "float32"], only=["OPT-01"])
    root = ET.fromstring(junit(records(verdict, "", 0.5)))
    assert [c.get("classname") for c in root.iter("testcase")] == ["GXPO.float64.OPT", "GXPO.float32.OPT"]


def test_junit_tells_the_whole_failure(wrong: list[Record]) -> None:
    """Whoever reads the CI server's page would have to run the suite again to learn what was wrong."""
    cases = {c.get("name")[:6]: c for c in ET.fromstring(junit(wrong)).iter("testcase")}
    r = of(wrong, "MOV-01")
    assert cases["MOV-01"].get("name") == f"MOV-01 {r['rule']}"
    failure = cases["MOV-01"].find("failure")
    assert failure.get("message") == r["message"]
    for part in (r["message"], NEAREST.does, NEAREST.id, f"gxpo-conformance repro MOV-01{COMMAND} --dtype float64"):
        assert part in failure.text
    skipped = {name: c.find("skipped").get("message") for name, c in cases.items() if c.find("skipped") is not None}
    assert skipped == {
        "MOV-02": "known-fail: a known <reason> https://example.org/7",
        "GAT-02": "blocked: leans on <OPT-02>, which did not pass",
        "GAT-10": "undeclared: needs gate_options:patience",
        "EST-04": "not run: no dtype of this run",
    }


@pytest.mark.parametrize(
    ("status", "verdicts", "color", "says"),
    [
        (0, ["pass"], "brightgreen", "42/42 MUST, 9/9 options"),
        (0, ["pass", "known-fail"], "yellow", "42/42 MUST, 1 known to fail"),
        (1, ["pass", "fail"], "red", "not conformant, 42/42 MUST"),
        (1, ["pass", "error"], "orange", "42/42 MUST, list of known failures out of date"),
        (130, ["pass"], "orange", "incomplete, 42/42 MUST"),
        (3, ["pass"], "orange", "incomplete, 42/42 MUST"),
    ],
)
def test_the_badge_is_green_for_a_pass_alone(
    wrong: list[Record], status: int, verdicts: list[str], color: str, says: str
) -> None:
    """A README would show green for a port that failed; or "invalid", which is what shields.io makes of a wrong key."""
    found = [r for r in wrong if r.get("verdict", "pass") in verdicts]
    counts = {"must": {"passed": 42, "all": 42}, "options": {"passed": 9, "declared": 9}}
    made = json.loads(badge(with_footer(found, exit_status=status, **counts)))
    assert made.pop("isError") == (color != "brightgreen")  # then ?color=green in the badge's address does nothing
    assert made == {"schemaVersion": 1, "label": f"GXPO {SPEC_VERSION}", "message": says, "color": color}


FETCHING = re.compile("script|link|img|iframe|object|embed|base|form|svg|src|srcset|action|data|on.*")


class Page(HTMLParser):
    """Reads a page as a browser would; fails where it could fetch or run something, or leads nowhere: opened from a
    mail or an archive it would be blank, or tell somebody's server who reads it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.inside: list[str] = []
        self.headings: list[int] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.pres: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.inside == []
        ids = self.all("id")
        assert len(ids) == len(set(ids))
        assert all(link.startswith("https://") or link[1:] in ids for link in self.all("href"))
        assert not re.search(r"@import|url\s*\(", text, re.I)
        assert text.startswith("<!DOCTYPE html>")
        assert not UNREADABLE.search(text)
        assert "default-src 'none'" in " ".join(self.all("content"))
        steps = zip([0, *self.headings], self.headings, strict=False)
        assert all(after - before <= 1 for before, after in steps), "a heading's level is skipped"
        assert all("scope" in given for tag, given in self.found if tag == "th")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        assert not any(map(FETCHING.fullmatch, (tag, *given)))
        self.found.append((tag, given))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "pre":
            self.pres.append("")
        if tag not in ("meta", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.inside:
            self.words += data
        if "pre" in self.inside:
            self.pres[-1] += data

    def all(self, attribute: str) -> list[str]:
        return [given[attribute] for _, given in self.found if attribute in given]


def test_a_port_cannot_write_the_page(hostile: list[Record]) -> None:
    """A port's error message would run as a script in the browser of whoever judges it, or hide its own verdict."""
    text = html(hostile, MATRIX)
    page = Page(text)
    polite = reported(Raises("a", "b"), only=["OPT-01", "EST-01"], known={"OPT-01": Known("OPT-01", "c", "d")})
    assert page.found == Page(html(polite, MATRIX)).found  # tags and attributes
    assert page.words.count("<script>alert(1)</script>") >= 4  # as text: title, name, reason, message
    for part in ("javascript:x", "{{ 7 * 191 }}", "characters left out"):
        assert part in page.words
    assert len(text) < 150_000


def test_every_clause_is_on_the_page(right: list[Record], wrong: list[Record]) -> None:
    """A clause that is missing reads like one that passed; a colour alone says nothing to one reader in twenty."""
    for found in (right, wrong):
        assert set(clauses()) <= set(Page(html(found, MATRIX)).all("id"))
    shown = set(re.findall(r'<td class="v-[a-z-]+">(.*?)</td>', html(wrong, {}), re.S))
    signs, words = zip(*(s.split(maxsplit=1) for s in shown), strict=True)
    assert set(words) == set(VERDICTS)
    assert len(set(signs)) == len(VERDICTS)


def test_the_page_tells_the_whole_failure(wrong: list[Record]) -> None:
    """The port's author would have to run the suite again to learn where to look."""
    r, page = of(wrong, "MOV-01"), Page(html(wrong, MATRIX))
    finding = r["finding"]
    place = f"{finding['tensor']}[{finding['coordinate'][0]}]"
    numbers = (
        repr(finding["got"]),
        repr(finding["wanted"]),
        f"{finding['budgets']:.3g}",
        "(4 allowed)",
        "a known <reason>",
    )
    for part in (r["rule"], "theta~, the third point asked", place, *numbers, NEAREST.id, NEAREST.does, r["rerun"]):
        assert part in page.words, part
    assert {"#mistake-alpha-on-excess", "#MOV-01-why", "https://example.org/7"} <= set(page.all("href"))
    assert r["case"] in [json.loads(pre) for pre in page.pres]


@pytest.mark.parametrize(
    ("verdicts", "status", "words", "tone"),
    [
        (["pass"], 0, "conformant (core)", "pass"),
        (["pass", "known-fail"], 0, "not conformant, as known: MOV-02", "known-fail"),
        (["pass", "fail", "error"], 1, "not conformant: MOV-01", "fail"),
        (["pass", "not run"], 3, "incomplete", "not-run"),
    ],
)
def test_the_banner_is_the_verdict(wrong: list[Record], verdicts: list, status: int, words: str, tone: str) -> None:
    """A glance at the page would leave the wrong impression: exit status 0 with known failures is no conformance."""
    some = [r for r in wrong if r.get("verdict", "pass") in verdicts]
    text = html(with_footer(some, exit_status=status, words=words), {})
    assert re.findall(r'class="banner" style="--tone: var\(--([a-z-]+)\)"', text) == [tone]
    heading = re.sub(r"<span.*?</span>", "", re.search(r"<h2>(.*?)</h2>", text)[1]).strip()
    assert heading == words.partition(":")[0].capitalize()
    assert ("That is not conformance." in text) == (tone == "known-fail")
    assert wrong[-1]["headline"] in text


def test_the_matrix_says_who_catches_whom() -> None:
    """Nobody could see which mistakes the suite catches; or one with a hole in it would get a green banner."""
    page = Page(matrix_page(MATRIX))
    for m in MATRIX["mutants"]:
        assert f"mistake-{m['id']}" in page.all("id")
        assert m["does"].replace("`", "") in page.words
    for told in ("✗GAT-02, 03", "MOV-01 also INV-03 (64)"):
        assert told in page.words
    assert "Caught by one clause alone: 1" in page.words
    assert "The suite tells right from wrong" in page.words
    bad = Page(matrix_page({**MATRIX, "problems": ["CKP-04: <nothing>"]}))
    assert "CKP-04: <nothing>" in bad.words
    assert "tells right from wrong" not in bad.words
