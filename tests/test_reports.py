"""The reports: what a reader, a CI server, a badge service and a browser are told about a run."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from gxpo_conformance.checks import clauses
from gxpo_conformance.known import Known
from gxpo_conformance.ports import oracle_port
from gxpo_conformance.protocol import Arrays, Config
from gxpo_conformance.reports.badge import badge
from gxpo_conformance.reports.html import html, matrix_page
from gxpo_conformance.reports.junit import junit
from gxpo_conformance.reports.record import Record, records
from gxpo_conformance.run import run

HOSTILE = "</pre></details><script>alert(1)</script>\x00\x1b[31m\x85\u202e\ud800 ]]> --> {{ 7 * 191 }} &amp; \"'\r\n"
MEGABYTE = HOSTILE + "long " * 200_000
UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff\ufffe\uffff]")


class GoesTooFar(oracle_port.Port):
    """Wrong in one way: its alpha is half as large again."""

    name = "goes too far"

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> oracle_port.Session:
        return super().start(params, {**config, "alpha": 1.5 * config["alpha"]}, dtype, device)


class Raises(oracle_port.Port):
    """Has a lot to say, in its name and whenever it is asked for anything."""

    name = HOSTILE + "x" * 1000

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> oracle_port.Session:
        raise RaisesText(MEGABYTE)


class RaisesText(Exception):
    def __repr__(self) -> str:  # repr() of a str escapes what the tests are about
        return str(self)


COMMAND = " --exec 'node \"<b>my port</b>.js\"'"
NEAREST = {"id": "alpha-on-excess", "does": "applies alpha to `q` - 1 & <i>not</i> to q", "source": "SFPO <1.0>"}
MATRIX = {
    "spec": "1.0",
    "suite": "1.0.0",
    "mutants": [
        {
            "id": "alpha-on-excess",
            "does": NEAREST["does"],
            "source": NEAREST["source"],
            "style": "functional",
            "clauses": ["MOV-01", "MOV-02"],
            "kills": {"float64": ["MOV-01", "MOV-02", "INV-03"], "float32": ["MOV-01", "MOV-02"], "bfloat16": []},
        },
        {
            "id": "sample-deviation",
            "does": "divides by w - 1",
            "source": "",
            "style": "in place",
            "clauses": ["GAT-03", "GAT-02"],
            "kills": {"float64": ["GAT-03"], "float32": ["GAT-03"], "bfloat16": ["GAT-03"]},
        },
    ],
    "problems": [],
}


def reported(port: oracle_port.Port, **how: Any) -> list[Record]:
    return records(run(port, ["float64"], **how), COMMAND, 0.5)


@pytest.fixture(scope="module")
def right() -> list[Record]:
    return reported(oracle_port.Port())


@pytest.fixture(scope="module")
def wrong() -> list[Record]:
    """A real run of a few clauses, and a result of every verdict that there is."""
    found = reported(GoesTooFar(), only=["MOV", "EXT-01", "EXT-06"])
    verdicts = {r["clause"]: r["verdict"] for r in found[1:-1]}
    assert (verdicts["MOV-01"], verdicts["EXT-06"]) == ("fail", "pass")
    by_clause = {r["clause"]: r for r in found[1:-1]}
    by_clause["MOV-01"]["nearest"] = NEAREST
    known = {"clause": "MOV-02", "reason": "a known <reason>", "link": "https://example.org/7", "dtypes": ["float64"]}
    by_clause["MOV-02"].update(verdict="known-fail", known=known)
    odd = [
        ("GAT-01", "float64", "error", "passes, though it is listed as known to fail"),
        ("GAT-02", "float64", "blocked", "leans on <OPT-02>, which did not pass"),
        ("GAT-10", "float64", "undeclared", "needs gate_options:patience"),
        ("EST-04", None, "not run", "no dtype of this run"),
    ]
    about = by_clause["EXT-06"]
    made = [{**about, "clause": c, "dtype": d, "verdict": v, "message": m, "seconds": 0.0} for c, d, v, m in odd]
    del made[-1]["seconds"]  # as records() has it for what did not run in any dtype
    return with_footer([found[0], *found[1:-1], *made, found[-1]])


@pytest.fixture(scope="module")
def hostile() -> list[Record]:
    known = {"EST-01": Known("EST-01", HOSTILE, "javascript:alert(1)")}
    found = reported(Raises(), only=["OPT-01", "EST-01"])
    odd = {**found[1], "clause": "EST-02", "verdict": "known-fail", "known": vars(known["EST-01"])}
    odd["nearest"] = {"id": HOSTILE, "does": MEGABYTE, "source": HOSTILE}
    odd["rerun"] = HOSTILE
    return with_footer([found[0], *found[1:-1], odd, found[-1]])


def with_footer(found: list[Record], **changes: Any) -> list[Record]:
    """The same with counts that are right for what is in it."""
    *others, foot = copy.deepcopy(found)
    counts = {v: sum(r["verdict"] == v for r in others[1:]) for v in foot["counts"]}
    return [*others, {**foot, "counts": counts, "results": len(others) - 1, **changes}]


# --------------------------------------------------------------------------------------------------------------- JUnit


def test_junit_counts_add_up(wrong: list[Record]) -> None:
    """A CI server would show fewer failures than there are, or more tests than ran."""
    root, counts = ET.fromstring(junit(wrong)), wrong[-1]["counts"]
    cases, suites = root.findall("testsuite/testcase"), root.findall("testsuite")
    assert len(cases) == int(root.get("tests")) == len(wrong) - 2
    expected = {
        "failure": counts["fail"],
        "error": counts["error"],
        "skipped": sum(counts[v] for v in ("known-fail", "blocked", "undeclared", "not run")),
    }
    for element in (root, *suites):
        for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(element.get(attribute)) == len(element.findall(f".//{tag}"))
            assert element is not root or int(element.get(attribute)) == expected[tag] > 0
        assert int(element.get("tests")) == len(element.findall(".//testcase"))
    assert [s.get("name") for s in suites] == ["float64 on cpu", "no dtype of this run"]


def test_junit_tells_the_whole_failure(wrong: list[Record]) -> None:
    """Whoever reads the CI server's page would have to run the suite again to learn what was wrong."""
    root = ET.fromstring(junit(wrong))
    case = next(c for c in root.iter("testcase") if c.get("name").startswith("MOV-01 "))
    r = next(r for r in wrong if r.get("clause") == "MOV-01")
    assert case.get("classname") == "GXPO.MOV"
    assert case.get("name") == f"MOV-01 {r['rule']}"
    failure = case.find("failure")
    assert r["message"].startswith(failure.get("message")[:60])
    for part in (r["message"], NEAREST["does"], NEAREST["id"], r["rerun"]):
        assert part in failure.text
    skipped = {
        c.get("name")[:6]: c.find("skipped").get("message")
        for c in root.iter("testcase")
        if c.find("skipped") is not None
    }
    assert skipped["MOV-02"] == "known-fail: a known <reason> https://example.org/7"
    assert skipped["GAT-02"] == "blocked: leans on <OPT-02>, which did not pass"
    assert skipped["GAT-10"] == "undeclared: needs gate_options:patience"
    assert skipped["EST-04"] == "not run: no dtype of this run"


def test_junit_is_xml_whatever_a_port_says(hostile: list[Record]) -> None:
    """One control character in a port's last words would cost its author the whole report."""
    text = junit(hostile)
    assert not UNREADABLE.search(text)
    assert len(text.encode()) < 100_000
    messages = [f.text for f in ET.fromstring(text).iter("failure")]
    assert "<script>alert(1)</script>" in messages[0]
    assert "characters left out" in messages[0]


# --------------------------------------------------------------------------------------------------------------- badge

# What shields.io takes from an endpoint; it refuses the whole badge for any other key.
BADGE_KEYS = {"schemaVersion": int, "label": str, "message": str, "color": str, "isError": bool}
GREENS = {"brightgreen", "green", "yellowgreen", "success"}


def test_badge_of_a_conformant_port(right: list[Record]) -> None:
    """shields.io would draw "invalid" for a port that did everything right."""
    must, options = right[-1]["must"], right[-1]["options"]
    found = json.loads(badge(right))
    assert {k: type(v) for k, v in found.items()} == BADGE_KEYS
    assert found == {
        "schemaVersion": 1,
        "label": "GXPO 1.0",
        "message": f"{must['all']}/{must['all']} MUST, {options['declared']}/{options['declared']} options",
        "color": "brightgreen",
        "isError": False,
    }
    bare = with_footer(right, options={"passed": 0, "declared": 0})
    assert json.loads(badge(bare))["message"] == f"{must['all']}/{must['all']} MUST"


@pytest.mark.parametrize(("status", "says"), [(1, "not conformant, "), (2, "not conformant, "), (3, "incomplete, ")])
def test_badge_is_never_green_without_a_pass(right: list[Record], status: int, says: str) -> None:
    """A README would show green for a port that failed, or that nobody tested."""
    found = json.loads(badge(with_footer(right, exit_status=status)))
    assert found["color"] not in GREENS
    assert found["message"].startswith(says)
    assert found["isError"] is True  # or ?color=green in the badge's address would win


def test_badge_says_that_failures_are_known() -> None:
    """Listing a failure as known would be a way to a green badge."""
    known = {c: Known(c, "a reason", "a link") for c in ("MOV-01", "MOV-02")}
    found = with_footer(reported(GoesTooFar(), only=["MOV-01", "MOV-02"], known=known), exit_status=0)
    assert found[-1]["counts"]["known-fail"] == 2
    shown = json.loads(badge(found))
    assert shown["color"] not in GREENS
    assert shown["message"].endswith(" MUST, 2 known to fail")


# ---------------------------------------------------------------------------------------------------------------- HTML

VOID = {"meta", "br", "hr", "img", "input", "link"}
FETCHING = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form", "svg"}


class Page(HTMLParser):
    """Reads a page as a browser would, and notes what it would fetch, run and link to."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pres: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in {tag}"
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        if tag == "pre":
            self.pres.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data
        if "pre" in self.open:
            self.pres[-1] += data


def checked(text: str) -> Page:
    """The page, well-formed, with nothing to fetch or run and no link into nowhere."""
    page = Page(text)
    assert not FETCHING & set(page.tags)
    assert {k for k, _ in page.attributes} & {"src", "srcset", "action", "background", "poster", "data"} == set()
    assert not any(k.startswith("on") for k, _ in page.attributes)
    assert not re.search(r"@import|url\s*\(", text, re.I)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    for link in page.links:
        assert link.startswith(("https://", "http://")) or link[1:] in page.ids, link
    assert text.startswith("<!DOCTYPE html>")
    assert not UNREADABLE.search(text)
    text.encode()
    return page


def test_the_page_needs_nothing_else(right: list[Record], wrong: list[Record]) -> None:
    """Opened from a mail or an archive it would be blank, or tell somebody's server who reads it."""
    for found in (right, wrong):
        for matrix in (MATRIX, {}):
            checked(html(found, matrix))
    checked(matrix_page(MATRIX))


def test_a_port_cannot_write_the_page(hostile: list[Record]) -> None:
    """A port's error message would run as a script in the browser of whoever judges it, or hide its own verdict."""
    text = html(hostile, {**MATRIX, "problems": [HOSTILE]})
    page = checked(text)
    assert page.words.count("<script>alert(1)</script>") >= 5  # as text: name, message, reason, known mistake, command
    assert "javascript:alert(1)" in page.words
    assert not any("javascript" in link for link in page.links)
    assert "1337" not in page.words  # 7 * 191: a template that a port wrote
    assert len(text) < 300_000
    assert page.words.count("characters left out") >= 3
    assert "default-src 'none'" in dict(page.attributes).values() or "default-src 'none'" in text


def test_every_clause_is_on_the_page(right: list[Record], wrong: list[Record]) -> None:
    """A clause that is missing reads like one that passed."""
    for found in (right, wrong):
        page = checked(html(found, {}))
        assert set(clauses()) <= set(page.ids)
    cells = re.findall(r'<td class="cell v-([a-z-]+)".*?>(.*?)</td>', html(wrong, {}), re.S)
    assert len(cells) == len(clauses())  # one dtype
    # A sign and a word each, for those who see no colours.
    found = {verdict: re.sub(r"<.*?>", "", shown).strip() for verdict, shown in cells}
    assert {v: words.split(maxsplit=1)[1] for v, words in found.items()} == {
        **{v: v for v in ("pass", "fail", "error", "known-fail", "blocked", "undeclared")},
        "not-run": "not run",
    }
    assert len({words.split()[0] for words in found.values()}) == len(found)


def test_the_page_tells_the_whole_failure(wrong: list[Record]) -> None:
    """The port's author would have to run the suite again to learn where to look."""
    r = next(r for r in wrong if r.get("clause") == "MOV-01")
    page, finding = checked(html(wrong, MATRIX)), r["finding"]
    for part in (
        r["rule"],
        "theta~, the third point asked",
        f"{finding['tensor']}[{finding['coordinate'][0]}]",
        repr(finding["got"]),
        repr(finding["wanted"]),
        f"{finding['budgets']:.3g}",
        "(4 allowed)",
        NEAREST["id"],
        "applies alpha to q - 1 & <i>not</i> to q",
        r["rerun"],
    ):
        assert part in page.words, part
    assert "#mistake-alpha-on-excess" in page.links
    assert r["case"] in [json.loads(pre) for pre in page.pres if pre.startswith("{")]
    assert "a known <reason>" in page.words
    assert "https://example.org/7" in page.links


def test_a_finding_that_no_table_holds_is_told_in_full(wrong: list[Record]) -> None:
    """What a clause says beyond place and numbers ("or -3.0, where ...") would be lost."""
    found = copy.deepcopy(wrong)
    r = next(r for r in found if r.get("clause") == "MOV-01")
    r["message"] = "theta~ differs: w[1] is -1.5, should be -1.0 (q = 1) or -3.0 (q at its bound)"
    del r["finding"]["budgets"]
    assert r["message"] in checked(html(found, {})).words


def test_a_case_too_long_for_a_page_is_left_out(wrong: list[Record]) -> None:
    """A browser would choke on a run of a thousand steps; and half a JSON object is none."""
    found = copy.deepcopy(wrong)
    r = next(r for r in found if r.get("clause") == "MOV-01")
    r["case"]["steps"] *= 1000
    page = checked(html(found, {}))
    assert "1000 steps" in page.words
    assert "--case FILE" in page.words
    assert max(map(len, page.pres)) < 100_000


@pytest.mark.parametrize(
    ("changes", "tone", "words"),
    [
        ({}, "pass", "Conformant (core + the declared options)"),
        ({"exit_status": 1, "words": "not conformant: MOV-01, EXT-01"}, "fail", "Not conformant"),
        ({"exit_status": 3, "words": "incomplete"}, "not-run", "Incomplete"),
    ],
)
def test_the_banner_is_the_verdict(right: list[Record], changes: dict, tone: str, words: str) -> None:
    """A glance at the page would leave the wrong impression."""
    text = html(with_footer(right, **changes), {})
    assert re.findall(r'class="banner" style="--tone: var\(--([a-z-]+)\)"', text) == [tone]
    heading = re.search(r"<h2>(.*?)</h2>", text)[1]
    assert re.sub(r"<span.*?</span>", "", heading).strip() == words
    assert right[-1]["headline"] in text


def test_known_failures_are_no_pass_on_the_page(wrong: list[Record]) -> None:
    """Exit status 0 would look like conformance."""
    some = [r for r in wrong if r.get("verdict") in (None, "known-fail", "pass")]
    text = html(with_footer(some, exit_status=0, words="not conformant, as known: MOV-02"), {})
    assert "--tone: var(--known-fail)" in text
    assert "Not conformant, as known" in text
    assert "That is not conformance." in text


def test_the_matrix_says_who_catches_whom() -> None:
    """Nobody could see which mistakes the suite is known to catch, or on which clause a catch depends alone."""
    text = matrix_page(MATRIX)
    page = checked(text)
    for m in MATRIX["mutants"]:
        assert f"mistake-{m['id']}" in page.ids
        assert m["does"].replace("`", "") in page.words
    titles = {v for k, v in page.attributes if k == "title"}
    assert "MOV-01 rejects alpha-on-excess in float64, float32" in titles
    assert "GAT-02 should reject it and does not" in titles
    assert re.search(r"<dt>GAT-03</dt><dd><a href=\"#mistake-sample-deviation\">", text)
    assert "<dt>MOV-01</dt>" not in text  # MOV-02 catches it, too
    for clause in clauses():
        assert f"<span>{clause}</span>" in text


def test_the_selftests_verdict_is_its_problems() -> None:
    """A suite with a hole in it would be published under a green banner."""
    good, bad = matrix_page(MATRIX), matrix_page({**MATRIX, "problems": ["CKP-04 rejects <nothing>"]})
    assert "The suite tells right from wrong" in good
    assert "tells right from wrong" not in bad
    assert "CKP-04 rejects &lt;nothing&gt;" in bad
    assert "--tone: var(--fail)" in bad
    published = {
        k: v for k, v in MATRIX.items() if k != "problems"
    }  # says nothing of problems, so neither does the page
    assert "tells right from wrong" not in matrix_page(published)
    assert "2 functional" not in matrix_page(published)
