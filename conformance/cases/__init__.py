"""The cases, by what they are about. Importing this package registers every check."""

from __future__ import annotations

from gxpo_conformance.cases import failures, gate, identities, step, toys

__all__ = ["failures", "gate", "identities", "step", "toys"]
