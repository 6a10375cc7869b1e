"""The adapter of gxpo.py: what a port's author writes, in full."""

from __future__ import annotations

import copy

import torch

import gxpo
from gxpo_conformance.protocol import Arrays, Config, Gradient, everything

BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class Port:
    name = f"gxpo.py {gxpo.__version__}"

    def capabilities(self) -> dict:
        return {**everything(), "devices": ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]}

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        return Session(params, config, getattr(torch, dtype), device)


class Session:
    def __init__(self, params: Arrays, config: Config, dtype: torch.dtype, device: str) -> None:
        self.theta = {k: torch.tensor(v, dtype=dtype, device=device, requires_grad=True) for k, v in params.items()}
        base = dict(config["optimizer"])
        settings = {**config, "gate": gxpo.Gate(**config["gate"])}
        del settings["optimizer"]
        self.opt = gxpo.GXPO(BASES[base.pop("name")](self.theta.values(), **base), **settings)

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        def closure() -> float:
            loss, grads = grad(self.params())
            if statistic is not None:
                self.opt.observe(statistic=statistic)
            for k, p in self.theta.items():
                p.grad = torch.as_tensor(grads[k]).to(p)
            return loss

        self.opt.step(closure)

    def params(self) -> Arrays:
        wide = {k: torch.promote_types(p.dtype, torch.float32) for k, p in self.theta.items()}  # bfloat16 as float32
        return {k: p.detach().to("cpu", wide[k]).numpy().copy() for k, p in self.theta.items()}

    def save(self) -> dict:
        return {"opt": self.opt.state_dict(), "theta": {k: p.detach().clone() for k, p in self.theta.items()}}

    def load(self, saved: dict) -> None:
        self.opt.load_state_dict(copy.deepcopy(saved["opt"]))  # torch's optimizers go on with the tensors themselves
        with torch.no_grad():
            for k, p in self.theta.items():
                p.copy_(saved["theta"][k])
