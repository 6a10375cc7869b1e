"""The clauses' checks, by what they are about. Importing anything from here registers every check."""

from __future__ import annotations

from gxpo_conformance.clauses import failures, gate, identities, random_runs, step, toys

__all__ = ["failures", "gate", "identities", "random_runs", "step", "toys"]
