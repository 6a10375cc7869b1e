"""The suite's cases as files, and what writes and compares them."""

from __future__ import annotations
