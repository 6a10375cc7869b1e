"""Makes `python -m gxpo_reference.benchmarks` the command."""

from __future__ import annotations

from gxpo_reference.benchmarks.cli import main

main()
