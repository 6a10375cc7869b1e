"""The cases, by what they are about. Importing this package registers every check."""

from __future__ import annotations

from gxpo_conformance.cases import failures, gate, step, whole

__all__ = ["failures", "gate", "step", "whole"]
