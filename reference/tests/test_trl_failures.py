"""If these fail, a run of GXPOTrainer that is stopped, fails or resumes is not what it was, or a wrong one is begun."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl_cases")  # which skips what needs TRL where there is none

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOTrainer
from trl_cases import MARKS, SETTINGS, Counts, logs, passes, same, weights

from gxpo import Gate
from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

pytestmark = MARKS


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_resumes_bit_for_bit(run: Callable[..., GRPOTrainer], make: Callable[..., GRPOTrainer]) -> None:
    """Otherwise an interrupted run is another run, or a closed gate opens again."""
    settings = {"gate": Gate(window=2, threshold=1e9, max_active_steps=4)}
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **SETTINGS["dropout"]}
    whole = run(gxpo=settings, **config)
    checkpoint = f"{whole.args.output_dir}/checkpoint-3"
    resumed = make(gxpo=settings, **config)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert passes(whole) == passes(resumed) == [3, 3, 3, 3, 1, 1]
    assert same(weights(whole), weights(resumed))
    assert logs(whole, drop="-")[:-1] == logs(resumed, drop="-")[:-1]  # the last entry is of the process, not the run
    assert whole.gxpo.gate_state == resumed.gxpo.gate_state

    plain = make(GRPOTrainer, **config)  # who gives up GXPO goes on from its checkpoint
    plain.train(resume_from_checkpoint=checkpoint)
    assert plain.state.global_step == 6


def test_a_plain_checkpoint_resumes_with_a_new_gate(
    run: Callable[..., GRPOTrainer], make: Callable[..., GRPOTrainer]
) -> None:
    """Otherwise GXPO cannot be tried on a run that is under way."""
    plain = run(GRPOTrainer, save_strategy="steps", save_steps=2)
    trainer = make(gxpo={"gate": None})
    trainer.train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-2")
    assert passes(trainer) == [3, 3]
    assert trainer.gxpo.gate_state.step == 2


def test_a_checkpoint_on_sigterm_is_made_after_the_step(make: Callable[..., GRPOTrainer]) -> None:
    """transformers would save between the passes and the step: the weights of theta~, and an optimizer in mid-step."""
    trainer = make(gxpo={"gate": None}, enable_jit_checkpoint=True)
    (jit,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    training_step = trainer.training_step

    def told_to_stop(*args: Any, **kwargs: Any) -> Tensor:
        jit.jit_manager.is_checkpoint_requested = trainer.state.global_step == 1
        return training_step(*args, **kwargs)

    trainer.training_step = told_to_stop
    trainer.train()
    assert trainer.state.global_step == 2
    after, checkpoint = weights(trainer), Path(trainer.args.output_dir) / "checkpoint-2"
    resumed = make(gxpo={"gate": None})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.gxpo.gate_state.step == 4
    plain = make(gxpo={"gate": None})
    plain.train()
    assert same(weights(plain), weights(resumed))
    assert not same(after, weights(plain))


# ------------------------------------------------------------------------------------------------------------- failures


class Remember(TrainerCallback):
    """What the first step left."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.weights, self.gate_state = weights(self.trainer), self.trainer.gxpo.gate_state
            self.optimizer = self.trainer.gxpo.state_dict()["state"]

    def check(self, trainer: GRPOTrainer) -> None:
        assert same(weights(trainer), self.weights)
        torch.testing.assert_close(trainer.gxpo.state_dict()["state"], self.optimizer, rtol=0, atol=0)
        assert trainer.gxpo.gate_state == self.gate_state


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_an_exception_in_any_pass_leaves_no_trace(make: Callable[..., GRPOTrainer], failing: int) -> None:
    """Otherwise who catches an out-of-memory, or saves on the way out, has the weights of the middle of a step."""
    seen = Remember()
    trainer = seen.trainer = make(trainer={"callbacks": [seen]}, **SETTINGS["accumulation"])
    calls = iter(range(1, 100))

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled() and next(calls) == 6 + failing:
            raise MemoryError("not enough")

    def checked(*args: Any) -> Tensor:
        try:
            return training_step(*args)
        except MemoryError:  # here, not only where train() is left: trainers that look for a batch size go on in there
            seen.check(trainer)
            raise

    hook = trainer.model.register_forward_pre_hook(fail)
    metrics, training_step, trainer.training_step = trainer._metrics, trainer.training_step, checked
    with pytest.raises(MemoryError):
        trainer.train()
    seen.check(trainer)
    assert trainer._metrics is metrics
    hook.remove()
    trainer.train()
    assert passes(trainer)[-4:] == [3, 3, 3, 3]


def test_a_run_stopped_between_micro_batches_leaves_nothing_to_replay(make: Callable[..., GRPOTrainer]) -> None:
    """Otherwise the next run's first step trains on rollouts of the last one."""

    class Stops(TrainerCallback):
        stop = True

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = self.stop

    stops = Stops()
    trainer = make(gxpo={"gate": None}, trainer={"callbacks": [stops]}, max_steps=1, **SETTINGS["accumulation"])
    trainer.train()
    stops.stop, counts = False, Counts(trainer)
    trainer.train()
    assert counts.forwards == counts.backwards == 6


def test_an_exception_before_the_last_step_leaves_no_trace(make: Callable[..., GRPOTrainer]) -> None:
    """The same where a callback fails after the third pass: no method of the loop's is on the stack then."""

    class Fails(Remember):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    seen = Fails()
    trainer = seen.trainer = make(trainer={"callbacks": [seen]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    seen.check(trainer)


@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("how", ["gradient and loss", "loss alone"])
def test_a_loss_that_is_not_finite_makes_a_plain_step(run: Callable[..., GRPOTrainer], failing: int, how: str) -> None:
    """Otherwise one overflow at a point nobody asked for ends the run."""
    factor, term = (torch.nan, 0.0) if how == "gradient and loss" else (1.0, torch.inf)

    class Overflows(GXPOTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * factor + term if self.calls == failing else loss

    plain, trainer = run(GRPOTrainer, max_steps=1), run(Overflows, max_steps=1)
    assert trainer.gxpo.report.outcome == "rolled back"
    assert trainer.state.log_history[0]["gxpo/rolled_back"] == 1
    assert same(weights(plain), weights(trainer))
    assert logs(plain) == logs(trainer)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("gxpo", "config", "error", "message"),
    [
        ({}, {"fp16": True}, ValueError, "args.fp16 is True.* set bf16=True"),
        (
            {"max_grad_norm": 0.5},
            {},
            ValueError,
            r"gxpo\['max_grad_norm'\] is 0.5, .* args.max_grad_norm = 1.0: set that",
        ),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 0.0}, ValueError, "is 1.0, .* args.max_grad_norm = 0.0"),
        ({"max_grad_norm": None}, {}, ValueError, "is None, .* args.max_grad_norm = 1.0"),
        ({"horizon": 1}, {}, ValueError, "horizon must be an int >= 2, got 1"),
        ({"lookahead": 5}, {}, TypeError, "lookahead"),
    ],
)
def test_wrong_settings_are_refused_when_the_trainer_is_made(
    make: Callable[..., GRPOTrainer], gxpo: dict[str, Any], config: dict[str, Any], error: type, message: str
) -> None:
    """Otherwise they are found after the model is loaded and the first rollout paid, or never."""
    with pytest.raises(error, match=message):
        make(gxpo=gxpo, **config)


def test_a_max_grad_norm_that_agrees_is_taken(make: Callable[..., GRPOTrainer]) -> None:
    """Otherwise settings that are right are refused."""
    for clip, wanted in ((0.5, 0.5), (0.0, None), (math.inf, None)):  # inf: to have the norm logged
        trainer = make(gxpo={"max_grad_norm": wanted}, max_grad_norm=clip)
        trainer.create_optimizer()
        assert trainer.gxpo.max_grad_norm == wanted


@pytest.mark.parametrize(
    ("pretended", "error", "message"),
    [
        ({"is_deepspeed_enabled": True}, RuntimeError, "DeepSpeed is enabled .* run without it"),
        ({"is_fsdp_enabled": True, "fsdp_version": 1}, RuntimeError, "fsdp_version = 1.* set fsdp_version to 2"),
        ({"mixed_precision": "fp16"}, ValueError, "accelerate's mixed precision is fp16.* set bf16=True"),
    ],
)
def test_what_owns_the_step_is_refused(
    make: Callable[..., GRPOTrainer],
    monkeypatch: pytest.MonkeyPatch,
    pretended: dict[str, Any],
    error: type,
    message: str,
) -> None:
    """Otherwise inner steps are skipped, scaled or of one shard without a word. None runs on a CPU: pretended."""
    original = Trainer.create_accelerator_and_postprocess

    def pretend(trainer: Trainer) -> None:
        original(trainer)
        trainer.is_deepspeed_enabled = pretended.get("is_deepspeed_enabled", False)
        trainer.is_fsdp_enabled = pretended.get("is_fsdp_enabled", False)
        plugin = SimpleNamespace(fsdp_version=pretended.get("fsdp_version"))
        precision = pretended.get("mixed_precision", "no")
        trainer.accelerator = SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(fsdp_plugin=plugin))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(error, match=message):
        make()
