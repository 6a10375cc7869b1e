"""Everything that has to be seen on a GPU, in one command: python -m gxpo_reference.benchmarks cuda-day --help."""

from __future__ import annotations
