"""Trainers on two processes (gloo): accelerate, Lightning and TRL, each with what it wraps a model in.

accelerate takes up FSDP2 on GPUs only. On a CPU its state is told so by hand, after which its own code shards the model
and swaps the parameters in the optimizer's groups, as it does there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from gxpo import GXPO, Gate, Report

SETTINGS = {"max_grad_norm": 1.0, "gate": Gate(window=3, threshold=2.0, patience=1, cooldown=2)}
Run = tuple[list[Tensor], list[float], str]  # parameters, figures of every report, what the model became


# ------------------------------------------------------------------------------------------------------ on one rank


def place(rank: int, world: int) -> None:
    """What a launcher says; the group itself is there already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "NODE_RANK": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1"}


def network() -> nn.Module:
    """Sizes that two does not divide."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def optimizer_of(model: nn.Module) -> GXPO:
    return GXPO(torch.optim.AdamW(model.parameters(), lr=0.02), **SETTINGS)


def rows() -> Tensor:
    """Eight a step; the fifth step's are so loud that the gate closes, and it opens again."""
    made = torch.randn(80, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    made[32:40] *= 12
    return made


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def told(model: nn.Module, reports: list[Report], wrapper: str) -> Run:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    figures = [figure for report in reports for figure in (report.passes, *report.grad_norms)]
    return [p.detach().clone() for p in whole], figures, wrapper


def shard_on_a_cpu(accelerator: Any, wrap: str) -> None:
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[wrap]
    )


def forget_accelerate() -> None:
    """Its state is one for the process, and the next scenario has another."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def with_accelerate(rank: int, world: int, fsdp: bool) -> Run:
    place(rank, world)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if fsdp:
        shard_on_a_cpu(accelerator, "Linear")
    model = network()
    optimizer = optimizer_of(model)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)
    model, _, loader = accelerator.prepare(model, optimizer, loader)
    reports, micro_batches = [], []
    for batch in loader:
        micro_batches.append(batch)
        if len(micro_batches) == 2:
            for _ in optimizer.passes():
                for micro_batch in micro_batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(loss_fn(model, micro_batch))
            reports.append(optimizer.report)
            micro_batches.clear()
    forget_accelerate()
    return told(model, reports, type(model).__name__)


def with_lightning(rank: int, world: int, manual: bool) -> Run:
    place(rank, world)
    import logging

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    reports: list[Report] = []

    class Policy(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = network(), not manual

        def configure_optimizers(self) -> GXPO:
            return optimizer_of(self)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            if not manual:
                return loss_fn(self.model, batch)

            def closure() -> Tensor:
                losses = [loss_fn(self.model, micro_batch) / 2 for micro_batch in batch.chunk(2)]
                for loss in losses:
                    self.manual_backward(loss)
                return sum(losses).detach()

            self.optimizers().step(closure)
            return None

        def on_train_batch_end(self, *_: Any) -> None:
            reports.append(self.trainer.optimizers[0].report)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **quiet,
    )
    policy = Policy()
    trainer.fit(policy, torch.utils.data.DataLoader(rows()[rank::world], batch_size=4))
    return told(policy, reports, type(trainer.strategy).__name__)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum((n + 1) * token for n, token in enumerate(ids)) % 11 / 10 for ids in completion_ids]


def with_trl(rank: int, world: int, folder: str, fsdp: bool) -> Run:
    place(rank, world)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer
    from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # the first half without averaging
    size = {"num_generations": 4, "max_completion_length": 5, "max_steps": 8, **batch}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "log_level": "error"}
    trainer = GXPOTrainer(
        tiny_model(),
        reward_funcs=reward,
        args=GRPOConfig(folder, use_cpu=True, bf16=False, learning_rate=1e-2, seed=1, **size, **quiet),
        train_dataset=Dataset.from_dict({"prompt": [f"repeat the digit {d} :" for d in "0123456789"]}),
        processing_class=tiny_tokenizer(),
        gxpo={"gate": Gate(window=2, threshold=0.5, patience=1)},
    )
    if fsdp:
        shard_on_a_cpu(trainer.accelerator, "Qwen2DecoderLayer")
        trainer.is_fsdp_enabled = True
    reports: list[Report] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            reports.append(trainer.gxpo.report)

    trainer.add_callback(Watch())
    trainer.train()
    wrapper = type(trainer.model_wrapped).__name__
    model = trainer.model_wrapped.module if wrapper == "DistributedDataParallel" else trainer.model_wrapped
    forget_accelerate()
    return told(model, reports, wrapper)


# ---------------------------------------------------------------------------------------------------------- as one


def alone() -> Run:
    model, reports = network(), []
    optimizer = optimizer_of(model)
    for batch in rows().split(8):
        for _ in optimizer.passes():
            loss_fn(model, batch).backward()
        reports.append(optimizer.report)
    return told(model, reports, "")


def is_one_model(mine: Run, theirs: Run, wrapper: str) -> None:
    """Weights, figures and the step of the fallback are the same on both ranks, and both kinds of steps were made."""
    assert mine[2] == wrapper
    assert mine[1] == theirs[1]
    assert {3, 1} <= set(mine[1])
    assert all(torch.equal(p, q) for p, q in zip(mine[0], theirs[0], strict=True))


@pytest.mark.parametrize(("fsdp", "wrapper"), [(False, "DistributedDataParallel"), (True, "FSDPSequential")])
def test_accelerate_trains_as_one_process_does(ranks: Ranks, fsdp: bool, wrapper: str) -> None:
    """README's loop, micro-batches and all: the parameters that accelerate swaps in have to be the ones that move."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[trainers]'")
    mine, theirs = ranks.run(with_accelerate, 2, fsdp)
    is_one_model(mine, theirs, wrapper)
    parameters, figures, _ = alone()
    assert mine[1] == pytest.approx(figures, rel=1e-10)
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(mine[0], parameters, strict=True))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_trains_as_one_process_does(ranks: Ranks, manual: bool) -> None:
    """DDP averages gradients in the closure's backward passes, all three of them."""
    pytest.importorskip("lightning", reason="lightning is not installed: pip install -e '.[trainers]'")
    mine, theirs = ranks.run(with_lightning, 2, manual)
    is_one_model(mine, theirs, "DDPStrategy")
    parameters, figures, _ = alone()
    assert mine[1] == pytest.approx(figures, rel=1e-10)
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(mine[0], parameters, strict=True))


def test_trl_trains_one_model(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank has its own prompts, rewards and loss. Whole or sharded, it is the same training to float32's rounding:
    Adam makes a few of it."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
    whole = ranks.run(with_trl, 2, str(tmp_path), False)
    is_one_model(*whole, "DistributedDataParallel")
    sharded = ranks.run(with_trl, 2, str(tmp_path), True)
    is_one_model(*sharded, "FSDPQwen2ForCausalLM")
    assert sharded[0][1] == pytest.approx(whole[0][1], rel=1e-4, abs=1e-5)
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(sharded[0][0], whole[0][0], strict=True))
