"""The run as a badge: what shields.io reads from an endpoint (https://shields.io/badges/endpoint-badge)."""

from __future__ import annotations

import json

from gxpo_conformance.reports.record import Record
from gxpo_conformance.trial import FAIL, KNOWN

RED, ORANGE, YELLOW, GREEN = "red", "orange", "yellow", "brightgreen"


def badge(records: list[Record]) -> str:
    """One JSON object; shields.io refuses keys that it does not know. Green means exit status 0 and nothing known to
    fail; `isError` keeps whoever shows the badge from giving it another colour."""
    head, *results, foot = records
    known = len({r["clause"] for r in results if r["verdict"] == KNOWN})
    must, options = foot["must"], foot["options"]
    passed = f"{must['passed']}/{must['all']} MUST"
    failed = any(r["verdict"] == FAIL for r in results)
    if failed:
        color, message = RED, f"not conformant, {passed}"
    elif foot["exit_status"] == 1:  # nothing failed, but what --known lists as failing passes
        color, message = ORANGE, f"{passed}, list of known failures out of date"
    elif foot["exit_status"] != 0:
        color, message = ORANGE, f"incomplete, {passed}"
    elif known:
        color, message = YELLOW, f"{passed}, {known} known to fail"
    else:
        color = GREEN
        message = f"{passed}, {options['passed']}/{options['declared']} options" if options["declared"] else passed
    label = f"GXPO {head['versions']['spec']}"
    made = {"schemaVersion": 1, "label": label, "message": message, "color": color, "isError": color != GREEN}
    return json.dumps(made) + "\n"
