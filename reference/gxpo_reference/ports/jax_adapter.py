"""The adapter of the JAX port: gxpo-conformance --impl gxpo_reference.ports.jax_adapter:Port"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gxpo_reference.ports.jax_gxpo import GXPO, Gate, State

jax.config.update("jax_enable_x64", True)  # or float64 is float32

Arrays = dict[str, np.ndarray]
Gradient = Callable[[Arrays], tuple[float, Arrays]]  # parameters -> the loss there and its gradient
Config = dict[str, Any]

CAPABILITIES: dict[str, Any] = {
    "dtypes": ["float64", "float32", "bfloat16"],
    "optimizers": ["sgd", "adamw"],
    "estimators": ["gradient", "displacement", "tensor"],
    "optimizer_state": ["keep", "restore"],
    "gate_statistics": ["corrective_norm", "initial_norm", "disagreement", "supplied", "never"],
    "gate_baselines": ["window", "ema"],
    "gate_options": ["patience", "two_sided", "warmup", "cooldown", "max_active_steps"],
    "max_grad_norm": True,
    "checkpoint": True,
    "nonfinite_gradients": True,
    "nonfinite_losses": True,
    "exceptions": True,
}


def sgd(lr: float, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """torch.optim.SGD: the decay goes through the momentum."""
    parts = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(*parts, optax.sgd(lr, momentum=momentum or None))


def adamw(lr: float, betas: list[float], eps: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(lr, *betas, eps=eps, weight_decay=weight_decay)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


@functools.cache  # one for all sessions of a config: it holds no state, and what it has compiled is worth keeping
def rule(config: str) -> GXPO:
    settings = json.loads(config)
    base = settings.pop("optimizer")
    tx = OPTIMIZERS[base.pop("name")](**base)
    return GXPO(tx, gate=Gate(**settings.pop("gate")), **settings)


class Port:
    name = f"jax_gxpo.py, jax {jax.__version__}, optax {optax.__version__}"

    def capabilities(self) -> dict:
        gpus = any(d.platform == "gpu" for d in jax.devices())
        return {**CAPABILITIES, "devices": ["cpu", "cuda"] if gpus else ["cpu"]}

    def start(self, params: Arrays, config: Config, dtype: str = "float64", device: str = "cpu") -> Session:
        return Session(params, config, dtype, jax.devices("gpu" if device == "cuda" else device)[0])


class Session:
    def __init__(self, params: Arrays, config: Config, dtype: str, device: Any) -> None:
        self.arrays = lambda given: {k: jax.device_put(jnp.asarray(v, dtype), device) for k, v in given.items()}
        self.gxpo, self.theta = rule(json.dumps(config)), self.arrays(params)
        state = self.gxpo.init(self.theta)
        # On the device for good, as parameters are: what jax is free to move would be compiled for a second time.
        self.state: State = dataclasses.replace(state, optimizer=jax.device_put(state.optimizer, device))

    def step(self, grad: Gradient, *, statistic: float | None = None) -> None:
        def value_and_grad(theta: Arrays) -> tuple[float, Arrays]:
            loss, grads = grad(out(theta))
            return loss, self.arrays(grads)

        self.theta, self.state, _ = self.gxpo.step(self.theta, self.state, value_and_grad, statistic)

    def params(self) -> Arrays:
        return out(self.theta)

    def save(self) -> Any:
        return self.theta, self.state  # nothing is ever changed in place

    def load(self, saved: Any) -> None:
        self.theta, self.state = saved


def out(theta: Arrays) -> Arrays:
    """As numpy arrays; bfloat16 travels as float32."""
    return {k: np.array(v, dtype=np.float64 if v.dtype == jnp.float64 else np.float32) for k, v in theta.items()}
