"""GXPO in JAX and in JavaScript, each with what puts it under the conformance suite."""

from __future__ import annotations
