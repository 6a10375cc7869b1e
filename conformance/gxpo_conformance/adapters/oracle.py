"""The adapter of the numpy oracle: the suite's own right answers, put through the suite."""

from __future__ import annotations

from gxpo_conformance.protocol import Arrays, Config, Gradient, everything
from gxpo_reference.oracle import Oracle


class Port:
    name = "numpy oracle"

    def capabilities(self) -> dict:
        return {**everything(), "dtypes": ["float64"], "devices": ["cpu"]}

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        if (dtype, device) != ("float64", "cpu"):
            raise ValueError(f"the oracle computes in float64 on a cpu, got {dtype} on {device}")
        return Session(Oracle(params, config))


class Session:
    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        self.oracle.step(grad, statistic)

    def params(self) -> Arrays:
        return {k: v.copy() for k, v in self.oracle.params.items()}

    def save(self) -> dict:
        return self.oracle.save()

    def load(self, saved: dict) -> None:
        self.oracle.load(saved)
