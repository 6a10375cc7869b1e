"""The pictures, drawn from results.json."""

from __future__ import annotations
