"""The adapter of minimal.py: gxpo-conformance --impl gxpo_reference.ports.minimal_adapter:Port"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gxpo_reference.minimal import GXPO

Arrays = dict[str, np.ndarray]
Gradient = Callable[[Arrays], tuple[float, Arrays]]  # parameters -> the loss there and its gradient
Config = dict[str, Any]

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
ONLY = {"estimator": "gradient", "optimizer_state": "keep"}
ONLY_GATE = {
    **{"statistic": "corrective_norm", "baseline": "window", "two_sided": False},
    **{"warmup": 0, "cooldown": None, "max_active_steps": None},
}


class Port:
    name = "minimal.py"

    def capabilities(self) -> dict[str, Any]:
        return {
            "dtypes": ["float64", "float32"],
            "devices": ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"],
            "optimizers": list(OPTIMIZERS),
            "estimators": ["gradient"],
            "optimizer_state": ["keep"],
            "gate_statistics": ["corrective_norm"],
            "gate_baselines": ["window"],
            "gate_options": ["patience"],
            "max_grad_norm": True,
        }

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        for part, only in ((config, ONLY), (config["gate"], ONLY_GATE)):
            for name, value in only.items():
                if part[name] != value:
                    raise ValueError(f"minimal.py has {name}={value!r} alone, got {part[name]!r}")
        return Session(params, config, getattr(torch, dtype), device)


class Session:
    def __init__(self, params: Arrays, config: Config, dtype: torch.dtype, device: str) -> None:
        self.theta = {k: torch.tensor(v, dtype=dtype, device=device, requires_grad=True) for k, v in params.items()}
        base = dict(config["optimizer"])
        self.gxpo = GXPO(
            OPTIMIZERS[base.pop("name")](self.theta.values(), **base),
            horizon=config["horizon"],
            alpha=config["alpha"],
            max_grad_norm=math.inf if config["max_grad_norm"] is None else config["max_grad_norm"],
            **{name: config["gate"][name] for name in ("window", "threshold", "patience")},
        )

    def step(self, grad: Gradient) -> None:
        def closure() -> None:
            _, grads = grad(self.params())
            for k, p in self.theta.items():
                p.grad = torch.as_tensor(grads[k]).to(p)

        self.gxpo.step(closure)

    def params(self) -> Arrays:
        wide = {k: torch.promote_types(p.dtype, torch.float32) for k, p in self.theta.items()}  # bfloat16 as float32
        return {k: p.detach().to("cpu", wide[k]).numpy().copy() for k, p in self.theta.items()}
