"""What a run is told in: lines on a terminal, JSON lines, JUnit XML, a page, a badge."""

from __future__ import annotations
