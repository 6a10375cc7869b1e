"""What gxpo.py is held against and used in: the oracle, baselines, trainers, ports, benchmarks."""

from __future__ import annotations
