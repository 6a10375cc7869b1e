"""A port in a process of its own, given as a command, judged."""

from __future__ import annotations

from gxpo_conformance.process.load import load
from gxpo_conformance.trial import Verdict, judge


def judged(command: str, time_limit: float = 5.0, only: str = "OPT-01") -> Verdict:
    port = load(None, command, time_limit)
    try:
        return judge(port, only=[only])
    finally:
        port.close()
