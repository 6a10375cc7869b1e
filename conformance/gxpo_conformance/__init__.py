"""The conformance suite: whether an implementation is GXPO, clause by clause."""

from __future__ import annotations
