"""GXPO in JAX and in JavaScript, each with what puts it under the conformance suite, as minimal.py is, too."""

from __future__ import annotations
