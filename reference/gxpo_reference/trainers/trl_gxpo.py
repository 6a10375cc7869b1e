"""GXPO inside TRL's GRPOTrainer: a mixin over `training_step`, and the trainer that has it.

    trainer = GXPOTrainer(model, reward_func, args=GRPOConfig(...), train_dataset=dataset,
                          gxpo={"horizon": 5, "alpha": 0.5, "gate": Gate(threshold=3.0)})
    trainer.train()

The trainer's own backward passes are the first pass. After the last micro-batch of a step the recorded micro-batches
are run twice more, at theta1 and at theta~; what is left in .grad is the corrective gradient, unclipped, and the
trainer clips, steps, schedules, logs and saves as it always does. Generation, rewards and advantages happen once a
step. While the gate is closed nothing is recorded or run again, and the trainer is GRPOTrainer bit for bit.

The replays see what the first pass saw: the same inputs, the same random numbers, the same tokens where
`top_entropy_quantile` chooses some, and the log-probabilities at theta0 as the old ones. TRL leaves those out where
they equal the current ones; recomputed in each replay, they would make every ratio 1, which is another loss.

A callback's `on_pre_optimizer_step` finds the model at theta~, with the corrective gradient: save and evaluate in
`on_step_end`. transformers' checkpoint on SIGTERM (`enable_jit_checkpoint`) waits for that by itself here.

Written against TRL 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]  # trl's own way to export it

from gxpo import GXPO

__all__ = ["GXPOMixin", "GXPOTrainer"]


class _MicroBatch(NamedTuple):
    inputs: dict[str, Any]  # as the loss takes them, old log-probabilities included
    num_items: Any
    state: dict[str, Any]  # as it was when the loss began, after generation
    tokens: Tensor | None  # those of high entropy at theta0, where `top_entropy_quantile` wants them


_Base = GRPOTrainer if TYPE_CHECKING else object  # for type checkers: what a mixin's `self` will be


class GXPOMixin(_Base):
    """Puts GXPO around the optimizer of a `trl.GRPOTrainer` or of a subclass: `class Mine(GXPOMixin, MyGRPOTrainer)`.
    The replays call the subclass's loss, but `transformers.Trainer`'s training_step: what is to count in every pass
    belongs into the loss.

    GXPO (arXiv 2605.06755) takes two optimizer steps on a batch, reads off from the two gradients how fast each
    coordinate's gradient shrinks, goes part of the way to where `horizon` steps would lead, and corrects from there
    with the true gradient: three backward passes a step while its gate is open, one afterwards.

    gxpo: keyword arguments of `gxpo.GXPO` as a dict: horizon (steps to predict), alpha (part of the way, 1 is all of
        it), gate, estimator, optimizer_state, rollback, replay_rng. max_grad_norm (a 2-norm) is the
        trainer's `args.max_grad_norm`, for the two fast steps as for the last; it may be repeated, not changed.
        A `Gate(statistic="supplied")` is supplied with the policy's mean entropy at theta0, in nats per token.
    Everything else goes to the trainer.

    A step in which all rewards of each group are equal has no gradient, and takes one pass.

    After `create_optimizer`, `self.gxpo` is the GXPO; `self.gxpo.report` tells what the last step did. Its metrics are
    logged with the trainer's, as "gxpo/passes", "gxpo/mean_q" and so on, averaged between logs like those; all the
    others are of the first pass, but for "step_time" (seconds), which is of all. The gate is part of optimizer.pt; a
    checkpoint of a plain GRPOTrainer loads too, the gate then starts anew.

    Raises ValueError for a setting out of bounds, fp16, a max_grad_norm that contradicts the trainer's and a GXPO in
    `optimizers`, TypeError for an unknown setting, RuntimeError under DeepSpeed and FSDP version 1. When a step fails,
    parameters and optimizer state are as before it.
    """

    # What TRL's adaptive entropy bonus changes while it computes the loss.
    _GXPO_LOSS_STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")

    def __init__(self, *args: Any, gxpo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._gxpo_settings = dict(gxpo or {})
        GXPO(torch.optim.SGD([torch.zeros(1)]), **self._gxpo_settings)  # complain now, not after loading a model
        self._gxpo_made: GXPO | None = None
        self._gxpo_phase = ""  # "record" in the first pass of an active step, "replay" in the others
        self._gxpo_clear()
        super().__init__(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):  # between the passes and the step there is nothing to save
                callback.on_pre_optimizer_step = lambda *args, **kwargs: None

    def _gxpo_clear(self) -> None:
        self._gxpo_batches: list[_MicroBatch] = []
        self._gxpo_losses: list[Tensor] = []
        self._gxpo_logps: Tensor | None = None
        self._gxpo_tokens: Tensor | None = None

    # -- the optimizer

    @property
    def gxpo(self) -> GXPO | None:
        """The GXPO, under whatever accelerate put around it; None before the optimizer is made."""
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, GXPO):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Also refuses the settings under which somebody else owns the optimizer's step."""
        clip = self.args.max_grad_norm if 0 < (self.args.max_grad_norm or 0) < math.inf else None  # as the trainer has
        if self._gxpo_settings.setdefault("max_grad_norm", clip) != clip:
            raise ValueError(
                f"gxpo['max_grad_norm'] is {self._gxpo_settings['max_grad_norm']!r}, but the trainer clips the last "
                f"step with args.max_grad_norm = {self.args.max_grad_norm!r}: set that alone, it clips all three"
            )
        fp16 = "mixed precision is fp16, whose GradScaler would hide skipped inner steps: set bf16=True, fp16=False"
        if self.args.fp16:  # before accelerate is asked, which refuses it on a CPU with less to say
            raise ValueError(f"args.fp16 is True, {fp16}")
        super().create_accelerator_and_postprocess()
        if self.accelerator.mixed_precision == "fp16":  # from `accelerate launch`
            raise ValueError(f"accelerate's {fp16}")
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                f"DeepSpeed is enabled (args.deepspeed = {self.args.deepspeed!r}), and its engine owns clipping and "
                "step: run without it"
            )
        version = getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) if self.is_fsdp_enabled else None
        if version == 1:
            raise RuntimeError(
                "the FSDP plugin has fsdp_version = 1, where each rank would see the norm and the ratio of its own "
                "shard only: set fsdp_version to 2"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, or the one passed in `optimizers`, in a GXPO; on a second call as it is."""
        super().create_optimizer(*args, **kwargs)
        if self.gxpo is None:
            self.optimizer = self._gxpo_made = GXPO(self.optimizer, **self._gxpo_settings)
            self.optimizer.register_step_post_hook(self._gxpo_log)
        elif self.gxpo is not self._gxpo_made:
            raise ValueError("optimizers holds a GXPO: pass its base optimizer there, and its settings as gxpo={...}")
        return self.optimizer

    def _gxpo_log(self, optimizer: GXPO, *_: Any) -> None:
        if not optimizer.gate_state.step:  # a checkpoint tool's step, which makes the state and is none of training
            return
        for name, value in optimizer.report.metrics().items():
            self._metrics["train"][name].append(value)

    # -- the first pass, recorded

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's. An exception between the last pass and the step, in a callback say, drops the step, too."""
        self._gxpo_clear()  # an earlier run may have stopped between two micro-batches
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            self._gxpo_abort()
            raise

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's; after a step's last micro-batch also the replays. Returns the loss at theta0."""
        try:
            opt = self.gxpo
            if opt is None:
                raise RuntimeError("there is no optimizer yet: call create_optimizer() before training_step()")
            self._gxpo_phase = "record" if opt.active else ""
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._gxpo_losses.append(loss)
            if self.accelerator.sync_gradients:
                self._gxpo_replay(model)
        except BaseException:
            self._gxpo_abort()
            raise
        finally:
            self._gxpo_phase = ""
        return loss

    def _gxpo_abort(self) -> None:
        self._gxpo_clear()
        if self.gxpo is not None:
            self.gxpo.abort()

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's; the first pass keeps what the replays need."""
        if self._gxpo_phase != "record":
            return super().compute_loss(model, inputs, *args, **kwargs)
        state, self._gxpo_logps, self._gxpo_tokens = self._gxpo_state(model), None, None
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        old_logps = inputs.get("old_per_token_logps")
        # A new dict: this one is the trainer's buffer's, which with several iterations comes up again.
        inputs = {**inputs, "old_per_token_logps": self._gxpo_logps if old_logps is None else old_logps}
        self._gxpo_batches.append(_MicroBatch(inputs, kwargs.get("num_items_in_batch"), state, self._gxpo_tokens))
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._gxpo_phase == "record" and outputs[0].requires_grad:  # the loss's own, not a reference model's
            self._gxpo_logps = outputs[0].detach()
        return outputs

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's; in the replays the first pass's, or the three losses would be of different tokens."""
        if self._gxpo_phase != "replay":
            self._gxpo_tokens = super().get_high_entropy_mask(*args, **kwargs)
        assert self._gxpo_tokens is not None  # the first pass has left them
        return self._gxpo_tokens

    # -- the other passes

    def _prepare_inputs(self, inputs: Any) -> Any:
        # GRPO's would generate anew, or take another slice of the buffer
        return inputs if self._gxpo_phase == "replay" else super()._prepare_inputs(inputs)

    def _gxpo_replay(self, model: nn.Module) -> None:
        opt, started = self.gxpo, time.perf_counter()
        assert opt is not None  # training_step has looked
        batches, losses = self._gxpo_batches, self._gxpo_losses
        metrics, after = self._metrics, self._gxpo_state(model) if batches else {}
        opt.observe(loss=sum(losses))  # of the whole batch: TRL divides a micro-batch's by their number
        if batches and opt.gate.statistic == "supplied":
            entropies = metrics["train"]["entropy"][-len(batches) :]
            opt.observe(statistic=sum(entropies) / len(entropies))
        self._gxpo_phase, self._metrics = "replay", {mode: defaultdict(list) for mode in metrics}
        try:
            while opt.lookahead():
                losses = []
                for n, batch in enumerate(batches, 1):
                    self._gxpo_set_state(batch.state, replay_rng=opt.replay_rng)
                    self._gxpo_tokens = batch.tokens
                    with contextlib.nullcontext() if n == len(batches) else self.accelerator.no_sync(model):
                        # not GRPOTrainer's, which counts the micro-batches that index its buffer
                        losses.append(Trainer.training_step(self, model, batch.inputs, batch.num_items))
                opt.observe(loss=sum(losses))
        finally:
            self._metrics = metrics
            self._gxpo_set_state(after)  # as if there had been one pass: the next rollout draws the same numbers
            self._gxpo_clear()
        if times := metrics["train"].get("step_time"):
            times[-1] += time.perf_counter() - started

    def _gxpo_state(self, model: nn.Module) -> dict[str, Any]:
        devices = {d for d in (self.accelerator.device, *(p.device for p in model.parameters())) if d.type != "cpu"}
        rng = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
        loss_state = {name: self.__dict__[name] for name in self._GXPO_LOSS_STATE if name in self.__dict__}
        return {"cpu": torch.get_rng_state(), "devices": rng, "loss": loss_state}

    def _gxpo_set_state(self, state: dict[str, Any], replay_rng: bool = True) -> None:
        if not state:
            return
        self.__dict__.update(state["loss"])
        if replay_rng:
            torch.set_rng_state(state["cpu"])
            for device, rng in state["devices"].items():
                torch.get_device_module(device).set_rng_state(rng, device)


class GXPOTrainer(GXPOMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with GXPO around its optimizer; see GXPOMixin for the argument `gxpo` and what is raised."""
