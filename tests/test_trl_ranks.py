"""GXPOTrainer under DDP: TRL, accelerate and GXPO on two processes (gloo)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from gxpo import Gate, Report

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    (tmp_path / "ranks").mkdir()
    made = Ranks(tmp_path / "ranks")
    yield made
    made.close()


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum((n + 1) * token for n, token in enumerate(ids)) % 11 / 10 for ids in completion_ids]


def train(rank: int, world: int, folder: str) -> tuple[list[Tensor], list[float], str]:
    """What accelerate reads to know its place; the group itself is there already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1"}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer
    from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

    size = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5, "max_steps": 8}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "log_level": "error"}
    trainer = GXPOTrainer(
        tiny_model(),
        reward_funcs=reward,
        args=GRPOConfig(folder, use_cpu=True, bf16=False, learning_rate=1e-2, seed=1, **size, **quiet),
        train_dataset=Dataset.from_dict({"prompt": [f"repeat the digit {d} :" for d in "0123456789"]}),
        processing_class=tiny_tokenizer(),
        gxpo={"gate": Gate(window=2, threshold=0.5, patience=1)},
    )
    reports: list[Report] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            reports.append(trainer.gxpo.report)

    trainer.add_callback(Watch())
    trainer.train()
    parameters = trainer.accelerator.unwrap_model(trainer.model).parameters()
    figures = [figure for report in reports for figure in (report.passes, report.loss, *report.grad_norms)]
    return [p.detach().clone() for p in parameters], figures, type(trainer.model_wrapped).__name__


def test_two_ranks_train_one_model(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank has its own prompts, rewards and loss; weights, figures and the step of the fallback must be one."""
    (mine, figures, wrapper), (theirs, others, _) = ranks.run(train, 2, str(tmp_path))
    assert wrapper == "DistributedDataParallel"
    assert figures == others
    assert {3, 1} <= set(figures)  # both kinds of steps were made
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
