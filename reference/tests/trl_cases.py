"""TRL trainers on models of a few thousand random numbers, the settings that people train with, and what a run shows.

Importing this skips the test module that does so where TRL or peft is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; nothing here is on the hub
pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[trl]'")

from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from gxpo import Gate
from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer
from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

# transformers 5 tells itself, wherever TRL calls it, that these names of its own are old
MARKS = [
    pytest.mark.usefixtures("light_garbage"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning"),
]

CLOSED = {"gate": Gate("never", max_active_steps=0)}
TIMES = ("step_time", "runtime", "per_second")  # the only figures that may differ between equal runs
DIGITS = Dataset.from_dict({"prompt": [f"repeat the digit {d} :" for d in "0123456789"]})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Arbitrary and different within nearly every group, so that nearly no gradient is zero."""
    return [sum((n + 1) * token for n, token in enumerate(ids)) % 11 / 10 for ids in completion_ids]


def made(
    folder: Path,
    cls: type[GRPOTrainer] = GXPOTrainer,
    gxpo: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> GRPOTrainer:
    """A trainer of 4 steps of 8 completions. config: GRPOConfig's own."""
    defaults = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "loss_type": "grpo",
        "use_bias_correction_kl": False,  # grpo_loss, which judges, has no such thing
        "seed": 1,
    }
    wanted = {"reward_funcs": reward, "train_dataset": DIGITS, "processing_class": tiny_tokenizer()}
    wanted |= {} if gxpo is None else {"gxpo": gxpo}
    policy = tiny_model(**(model or {}))
    if config.get("beta"):  # TRL loads the reference model from where the policy came
        policy.config._name_or_path = str(folder / "policy")
        policy.save_pretrained(folder / "policy")
    return cls(policy, args=GRPOConfig(**(defaults | config)), **(wanted | (trainer or {})))


def logs(trainer: GRPOTrainer, drop: str = "gxpo/") -> list[dict[str, Any]]:
    """Everything that was logged, without GXPO's own figures and without times."""
    return [
        {k: v for k, v in entry.items() if drop not in k and not any(time in k for time in TIMES)}
        for entry in trainer.state.log_history
    ]


def weights(trainer: GRPOTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def passes(trainer: GRPOTrainer) -> list[float]:
    return [entry["gxpo/passes"] for entry in trainer.state.log_history if "gxpo/passes" in entry]


class Counts:
    """How often the trainer does what costs time."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.forwards = self.backwards = self.rollouts = self.rewards = 0
        trainer.model.register_forward_pre_hook(self._forward)
        trainer.accelerator.backward = self._counting("backwards", trainer.accelerator.backward)
        trainer._generate_and_score_completions = self._counting("rollouts", trainer._generate_and_score_completions)
        trainer._calculate_rewards = self._counting("rewards", trainer._calculate_rewards)

    def _forward(self, *_: Any) -> None:
        self.forwards += torch.is_grad_enabled()  # generation and old log-probabilities go without

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*args, **kwargs)

        return counted


# What people train with. Each is compared with the plain trainer of the same settings.
LORA = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "rollouts between micro-batches": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "model": {"dropout": 0.2},
    },
    "two iterations": {"num_iterations": 2},
    "two iterations in one step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "num_iterations": 2,
        "model": {"dropout": 0.2},
    },
    "two steps a rollout": {"steps_per_generation": 2, "per_device_train_batch_size": 4},
    "beta": {"beta": 0.1},
    "dropout": {"model": {"dropout": 0.2}},
    "lora": {"trainer": {"peft_config": LORA}},
    "lora, beta": {"trainer": {"peft_config": LORA}, "beta": 0.1},
    "gradient checkpointing": {"gradient_checkpointing": True, "model": {"dropout": 0.2}},
    "bfloat16 autocast": {"bf16": True},
    "llama": {"model": {"name": "tiny-llama"}},
    "adaptive entropy": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.05,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "trainer": {"eval_dataset": DIGITS.select(range(2))}},
    "no clipping": {"max_grad_norm": 0.0},
    "top entropy": {"top_entropy_quantile": 0.4},
    "trl's own loss": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
}
