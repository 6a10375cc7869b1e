"""The run as JUnit XML, for whatever already shows test results: a suite a dtype, a test case a clause."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from gxpo_conformance.reports.causes import explained, told
from gxpo_conformance.reports.record import Record, on_a_line
from gxpo_conformance.trial import BLOCKED, ERROR, FAIL, KNOWN, NOT_RUN, UNDECLARED

SKIPPED = (KNOWN, BLOCKED, UNDECLARED, NOT_RUN)


def junit(records: list[Record]) -> str:
    """The records of one run as an XML document. Each result is one test case, so that the counts are the footer's."""
    head, *results, foot = records
    root = ET.Element("testsuites", name=f"GXPO conformance {head['versions']['spec']}", time=str(foot["seconds"]))
    counts(root, results)
    for dtype in [*head["dtypes"], None]:
        some = [r for r in results if r["dtype"] == dtype]
        if some:
            root.append(suite(dtype, some, head, foot))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def counts(element: ET.Element, results: list[Record]) -> None:
    of = [r["verdict"] for r in results]
    element.set("tests", str(len(of)))
    element.set("failures", str(of.count(FAIL)))
    element.set("errors", str(of.count(ERROR)))
    element.set("skipped", str(sum(v in SKIPPED for v in of)))


def suite(dtype: str | None, results: list[Record], head: Record, foot: Record) -> ET.Element:
    """`dtype`: None for what no dtype of the run can show."""
    made = ET.Element("testsuite", name=f"{dtype} on {head['device']}" if dtype else "no dtype of this run")
    counts(made, results)
    made.set("time", f"{sum(r.get('seconds', 0.0) for r in results):.4f}")
    made.set("timestamp", head["date"][:19])  # UTC; the schemas in use have no place for an offset
    properties = ET.SubElement(made, "properties")
    about = {"port": head["port"], "device": head["device"], **head["versions"]}
    about |= {"headline": foot["headline"], "verdict": foot["words"]}
    about |= {numbered(n, foot): told(cause) for n, cause in enumerate(foot["causes"], 1)}
    for name, value in about.items():
        ET.SubElement(properties, "property", name=name, value=on_a_line(value))
    made.extend(test_case(r, foot) for r in results)
    return made


def numbered(n: int, foot: Record) -> str:
    return f"cause {n} of {len(foot['causes'])}"


def test_case(r: Record, foot: Record) -> ET.Element:
    name, where = f"{r['clause']} {r['rule']}", f"GXPO.{r['dtype'] or 'no dtype'}.{r['clause'][:3]}"
    made = ET.Element("testcase", classname=where, name=name, time=f"{r.get('seconds', 0.0):.4f}")
    if r["verdict"] in (FAIL, ERROR):
        tag = "failure" if r["verdict"] == FAIL else "error"
        found = ET.SubElement(made, tag, message=on_a_line(r["message"]), type=kind(r))
        found.text = full_text(r, foot)
    elif r["verdict"] in SKIPPED:
        found = ET.SubElement(made, "skipped", message=on_a_line(f"{r['verdict']}: {reason(r)}"))
        if r["verdict"] == KNOWN:
            found.text = full_text(r, foot)
    return made


def kind(r: Record) -> str:
    finding = r.get("finding", {})
    return "time-out" if finding.get("timed_out") else "crash" if finding.get("crash") else r["verdict"]


def reason(r: Record) -> str:
    return f"{r['known']['reason']} {r['known']['link']}" if "known" in r else r["message"]


def full_text(r: Record, foot: Record) -> str:
    """Which of the run's causes it has, what was found, what that looks like, the command that runs it again."""
    cause = f"{numbered(r['cause'], foot)}: {told(foot['causes'][r['cause'] - 1])}" if "cause" in r else ""
    lines = [*([cause] if cause else []), r["message"], *(line for line in explained(r) if line not in cause)]
    if "rerun" in r:
        lines.append(r["rerun"])
    return "\n".join(lines)
