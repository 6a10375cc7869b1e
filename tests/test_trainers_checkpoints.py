"""If these fail, accelerate or GXPOTrainer under FSDP2 goes on from a checkpoint with another gate, rate or state."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_trainers_on_ranks import forget_accelerate, loss_fn, network, optimizer_of, place, reward, rows
from torch import Tensor, nn

from gxpo import GXPO, Gate
from gxpo import Report as Told

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"  # the first is accelerate's default under FSDP2


def all_of(model: nn.Module, optimizer: GXPO) -> dict[str, Any]:
    """All that a checkpoint has to bring back, of a rank's own parts."""
    moments = [optimizer.state.get(p, {}) for p in model.parameters()]
    groups = [{k: v for k, v in group.items() if k not in ("params", "gxpo")} for group in optimizer.param_groups]
    parts = [p.detach() for p in model.parameters()]
    gate = asdict(optimizer.gate_state)
    return deepcopy({"gate": gate, "groups": groups, "weights": local(parts), "moments": local(moments)})


def local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [local(item) for item in value]
    return value.to_local() if hasattr(value, "to_local") else value


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# ------------------------------------------------------------------------------------------------------- accelerate


def shard(accelerator: Any, wrap: str, form: str) -> None:
    """As test_trainers_on_ranks does it, and for good: who asks accelerate for its state anew gets PartialState's."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    names = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": [wrap]}
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=form, **names)


class Loop:
    """README's loop. The gate closes at the fifth step and opens again."""

    def __init__(self, rank: int, world: int, form: str, lr: float) -> None:
        place(rank, world)
        from accelerate import Accelerator

        forget_accelerate()
        self.accelerator = Accelerator(cpu=True)
        shard(self.accelerator, "Linear", form)
        model = network()
        self.optimizer = optimizer_of(model)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.batches = rows().split(8)
        self.mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        self.model, _, self.schedule = self.accelerator.prepare(model, self.optimizer, schedule)

    def steps(self, first: int, last: int) -> Iterator[Told]:
        for batch in self.batches[first:last]:
            for _ in self.optimizer.passes():
                self.accelerator.backward(loss_fn(self.model, batch[self.mine]))
            self.schedule.step()
            yield self.optimizer.report


def with_accelerate(rank: int, world: int, form: str, at: int, warm: bool, folder: str) -> list[str]:
    """What is not as it was, right after load_state() and after the steps that follow."""
    loop = Loop(rank, world, form, 0.02)
    list(loop.steps(0, at))
    loop.accelerator.save_state(folder)
    then, rest = all_of(loop.model, loop.optimizer), list(loop.steps(at, 10))
    end = all_of(loop.model, loop.optimizer)
    loop = Loop(rank, world, form, 0.5)
    for p in loop.model.parameters():
        p.detach().zero_()
    list(loop.steps(2, 7) if warm else ())
    loop.accelerator.load_state(folder)
    now = all_of(loop.model, loop.optimizer)
    wrong = [what for what in then if not same(then[what], now[what])]
    wrong += ["reports"] * (list(loop.steps(at, 10)) != rest)
    now = all_of(loop.model, loop.optimizer)
    forget_accelerate()
    return wrong + [f"{what} at the end" for what in end if not same(end[what], now[what])]


@pytest.mark.parametrize("form", [SHARDED, FULL])
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("at", [2, 5, 8], ids=["window half full", "gate closed", "open again"])
def test_accelerate_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path, at: int, warm: bool, form: str) -> None:
    """accelerate hands torch its own wrapper; torch makes the state by a first step at a rate of 0, through it."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[trainers]'")
    assert ranks.run(with_accelerate, 2, form, at, warm, str(tmp_path)) == [[], []]


# -------------------------------------------------------------------------------------------------------------- TRL


def with_trl(rank: int, world: int, folder: str, form: str, checkpoint: str | None) -> tuple[dict[str, Any], list[Any]]:
    """What is left of a run of eight steps, saved after the fifth, or of one that goes on from that."""
    place(rank, world)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer
    from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

    forget_accelerate()
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    size = {"num_generations": 4, "max_completion_length": 5, "max_steps": 8, **batch}
    saves = {"save_strategy": "steps", "save_steps": 5}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "log_level": "error"}
    trainer = GXPOTrainer(
        tiny_model(),
        reward_funcs=reward,
        args=GRPOConfig(folder, use_cpu=True, bf16=False, learning_rate=1e-2, seed=1, **size, **saves, **quiet),
        train_dataset=Dataset.from_dict({"prompt": [f"repeat the digit {d} :" for d in 4 * "0123456789"]}),  # one epoch
        processing_class=tiny_tokenizer(),
        gxpo={"gate": Gate(window=2, threshold=1e9, max_active_steps=6)},
    )
    shard(trainer.accelerator, "Qwen2DecoderLayer", form)
    trainer.is_fsdp_enabled = True
    reports: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            reports.append((trainer.gxpo.report, [group["lr"] for group in trainer.gxpo.param_groups]))

    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=checkpoint)
    forget_accelerate()
    return all_of(trainer.model_wrapped, trainer.gxpo), reports


@pytest.mark.parametrize("form", [SHARDED, FULL])
def test_trl_resumes_bit_for_bit(ranks: Ranks, tmp_path: Path, form: str) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
    whole = ranks.run(with_trl, 2, str(tmp_path / "whole"), form, None)
    resumed = ranks.run(with_trl, 2, str(tmp_path / "resumed"), form, str(tmp_path / "whole" / "checkpoint-5"))
    for (end, reports), (end_of_resumed, reports_of_resumed) in zip(whole, resumed, strict=True):
        assert {report.passes for report, _ in reports[5:]} == {3, 1}
        assert reports_of_resumed == reports[5:]
        assert [what for what in end if not same(end[what], end_of_resumed[what])] == []
