"""GXPO inside the real TRL GRPOTrainer, on models of a few thousand random numbers.

If these fail, people who train with reference/trainers/trl_gxpo.py train something else than GXPO, or pay for it with
rollouts, logs or checkpoints that differ from those of the trainer they know.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; nothing here is on the hub
pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[trl]'")

from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo import GXPO, Gate
from gxpo_reference.grpo_loss import grpo_loss
from gxpo_reference.trainers import trl_example
from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer
from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

# transformers 5 tells itself, wherever TRL calls it, that these names of its own are old
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning")

CLOSED = {"gate": Gate("never", max_active_steps=0)}
TIMES = ("step_time", "runtime", "per_second")  # the only figures that may differ between equal runs
DIGITS = Dataset.from_dict({"prompt": [f"repeat the digit {d} :" for d in "0123456789"]})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Arbitrary and different within nearly every group, so that nearly no gradient is zero."""
    return [sum((n + 1) * token for n, token in enumerate(ids)) % 11 / 10 for ids in completion_ids]


@pytest.fixture(scope="module", autouse=True)
def _light_garbage() -> Iterator[None]:
    """train() calls gc.collect(), which would walk through all that TRL has imported: half of a run's time here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., GRPOTrainer]:
    """make(class, gxpo=..., model=..., trainer=..., **GRPOConfig's own): a trainer of 4 steps of 8 completions."""

    def make(
        cls: type[GRPOTrainer] = GXPOTrainer,
        gxpo: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        **config: Any,
    ) -> GRPOTrainer:
        defaults = {
            "output_dir": str(tmp_path / "out"),
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
            policy.config._name_or_path = str(tmp_path / "policy")
            policy.save_pretrained(tmp_path / "policy")
        return cls(policy, args=GRPOConfig(**(defaults | config)), **(wanted | (trainer or {})))

    return make


@pytest.fixture
def run(make: Callable[..., GRPOTrainer]) -> Callable[..., GRPOTrainer]:
    """make(...), trained. Seeds are set where a trainer is made: the next is made after the last has run."""

    def run(*args: Any, watch: Callable[[GRPOTrainer], Any] = lambda trainer: None, **kwargs: Any) -> GRPOTrainer:
        trainer = make(*args, **kwargs)
        trainer.start, trainer.watched = weights(trainer), watch(trainer)
        trainer.train()
        return trainer

    return run


@pytest.fixture(scope="module")
def plain_runs() -> dict[str, GRPOTrainer]:
    return {}


@pytest.fixture
def plain_run(run: Callable[..., GRPOTrainer], plain_runs: dict[str, GRPOTrainer]) -> Callable[[str], GRPOTrainer]:
    """plain_run(name): TRL's own trainer with SETTINGS[name], trained; once for all tests."""

    def plain_run(name: str) -> GRPOTrainer:
        if name not in plain_runs:
            plain_runs[name] = run(GRPOTrainer, **SETTINGS[name])
        return plain_runs[name]

    return plain_run


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


@pytest.mark.parametrize("name", SETTINGS)
def test_a_closed_gate_is_the_plain_trainer_bit_for_bit(
    run: Callable[..., GRPOTrainer], plain_run: Callable[[str], GRPOTrainer], name: str
) -> None:
    """Otherwise who falls back, or compares with a baseline, gets a trainer that nobody has studied."""
    plain, closed = plain_run(name), run(gxpo=CLOSED, **SETTINGS[name])
    assert passes(closed) == [1, 1, 1, 1]
    assert same(weights(plain), weights(closed))
    assert not same(weights(plain), plain.start)
    assert logs(plain) == logs(closed)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_pass_sees_what_the_first_saw(run: Callable[..., GRPOTrainer], name: str) -> None:
    """At learning rate 0 three passes are one, to the last bit, and everything logged is as plain. Otherwise replays
    take other inputs, dropout masks or log-probabilities (noise that the ratio reads as curvature), count twice in the
    metrics, or change what the next rollout samples."""
    plain = run(GRPOTrainer, learning_rate=0.0, **SETTINGS[name])
    active = run(gxpo={"gate": None}, learning_rate=0.0, **SETTINGS[name])
    assert passes(active) == [3, 3, 3, 3]
    for entry in active.state.log_history[:-1]:
        norms = {value for key, value in entry.items() if key.startswith("gxpo/grad_norm")}
        assert len(norms) <= 1, norms  # none in an evaluation's entry
    assert same(weights(plain), weights(active))
    assert logs(plain) == logs(active)


@pytest.mark.parametrize("name", SETTINGS)
def test_active_steps_train(
    run: Callable[..., GRPOTrainer], plain_run: Callable[[str], GRPOTrainer], name: str
) -> None:
    """Otherwise GXPO does nothing there, or logs and learning rates are not those people know from the trainer."""
    plain, active = plain_run(name), run(gxpo={"gate": None}, **SETTINGS[name])
    assert passes(active) == [3, 3, 3, 3]
    assert all(p.isfinite().all() for p in weights(active))
    trained = [p.requires_grad for p in active.model.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(active.start, weights(active), strict=True)]
    assert moved == trained
    assert not same(weights(plain), weights(active))
    first = [{k: v for k, v in logs(trainer)[0].items() if k != "grad_norm"} for trainer in (plain, active)]
    assert first[0] == first[1]  # of the pass at theta0, which is where both start; the norm is the corrective one
    assert [entry.keys() for entry in logs(plain)] == [entry.keys() for entry in logs(active)]
    rates = [[entry.get("learning_rate") for entry in trainer.state.log_history] for trainer in (plain, active)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("accumulation", "iterations", "steps_per_generation", "rollouts"),
    [(1, 1, None, 4), (2, 1, None, 4), (1, 2, None, 2), (2, 2, None, 2), (1, 1, 2, 2), (2, 1, 1, 8), (1, 2, 2, 1)],
)
def test_three_passes_then_one_and_rollouts_as_plain(
    run: Callable[..., GRPOTrainer],
    accumulation: int,
    iterations: int,
    steps_per_generation: int | None,
    rollouts: int,
) -> None:
    """Otherwise a step costs more rollouts, which are dearest, or more passes than was said."""
    config = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "num_iterations": iterations,
        "steps_per_generation": steps_per_generation,
    }
    plain = run(GRPOTrainer, watch=Counts, **config)
    gxpo = run(gxpo={"gate": Gate("never", max_active_steps=2)}, watch=Counts, **config)
    counts = [plain.watched, gxpo.watched]
    assert passes(gxpo) == [3, 3, 1, 1]
    assert [c.rollouts for c in counts] == [c.rewards for c in counts] == [rollouts, rollouts]
    assert [c.forwards for c in counts] == [c.backwards for c in counts] == [4 * accumulation, 8 * accumulation]
    assert plain._step == gxpo._step == 4 * accumulation


def test_the_time_of_a_step_is_that_of_all_its_passes(run: Callable[..., GRPOTrainer]) -> None:
    """Otherwise GXPO looks three times cheaper in the log than it is."""

    seconds = [0.0] * 4

    def watch(trainer: GRPOTrainer) -> None:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                result = function(*args, **kwargs)
                seconds[trainer.state.global_step] += time.perf_counter() - started
                return result

            return run

        trainer.compute_loss = timed(trainer.compute_loss)
        trainer.accelerator.backward = timed(trainer.accelerator.backward)

    trainer = run(gxpo={"gate": None}, watch=watch, num_iterations=4)  # one rollout: the later steps are passes alone
    times = [entry["step_time"] for entry in trainer.state.log_history[:-1]]
    assert all(logged > measured > 0 for logged, measured in zip(times, seconds, strict=True))


def test_the_check_for_the_same_batch_is_content(run: Callable[..., GRPOTrainer]) -> None:
    """GXPO's own debugging aid, a second gradient at theta0. Otherwise the replays are not of the batch."""
    name = "two iterations in one step"
    trainer = run(gxpo={"gate": None, "check_same_batch": True}, learning_rate=0.1, **SETTINGS[name])
    assert all(entry["gxpo/active"] for entry in trainer.state.log_history[:-1])


def test_what_is_logged_between_is_averaged(run: Callable[..., GRPOTrainer]) -> None:
    """Otherwise a log every tenth step shows one step in ten."""
    trainer = run(gxpo={"gate": Gate("never", max_active_steps=1)}, logging_steps=2)
    assert passes(trainer) == [2, 1]
    assert [entry.get("gxpo/active") for entry in trainer.state.log_history] == [0.5, 0, None]


@pytest.mark.parametrize(
    ("arguments", "passes"), [([], "6 passes"), (["--plain", "--model", "tiny-llama"], "2 passes")]
)
def test_the_example_runs(capsys: pytest.CaptureFixture[str], arguments: list[str], passes: str) -> None:
    """Otherwise the first thing that people try fails."""
    assert trl_example.main(["--steps", "2", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["step", "reward", "loss", "norm", "passes"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert f"2 steps, {passes}" in lines[3]


# ------------------------------------------------------------------------- the step is GXPO's


class Forgetful(GXPOTrainer):
    """What TRL does by itself: log-probabilities at hand count as the old ones, in every pass."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._gxpo_phase == "replay":
            inputs = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("name", ["plain", "accumulation", "two iterations", "beta", "llama", "no clipping"])
def test_a_step_is_that_of_a_closure_with_old_log_probabilities_at_theta0(
    run: Callable[..., GRPOTrainer], name: str
) -> None:
    """The same rollouts, a loss and a loop of our own. Otherwise the trainer's step is not GXPO's: above all where
    replays recompute the old log-probabilities, which makes every ratio 1 and nothing is ever clipped."""
    steps = SETTINGS[name].get("num_iterations", 1)  # on the one rollout, whose log-probabilities the second keeps
    sgd = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    config, settings = SETTINGS[name] | sgd | {"max_steps": steps}, {"horizon": 5, "alpha": 1.0}
    trainer, forgetful = (run(cls, gxpo=settings, **config) for cls in (GXPOTrainer, Forgetful))
    model = tiny_model(**config.get("model", {})).train()
    batches = trainer._buffered_inputs
    beta = config.get("beta", 0.0)

    def logps(batch: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        all_logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        return all_logps.gather(2, ids[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]

    old_logps = [logps(batch).detach() for batch in batches]

    def closure() -> Tensor:
        losses = [
            grpo_loss(
                logps(batch),
                old,
                batch["advantages"],
                batch["completion_mask"],
                ref_logps=batch.get("ref_per_token_logps"),
                beta=beta,
            )[0]
            / len(batches)
            for batch, old in zip(batches, old_logps, strict=True)
        ]
        sum(losses).backward()
        return sum(losses)

    opt = GXPO(
        torch.optim.SGD(model.parameters(), lr=0.5), **settings, max_grad_norm=config.get("max_grad_norm", 1.0) or None
    )
    for _ in range(steps):
        loss = opt.step(closure)
    assert opt.report.outcome == trainer.gxpo.report.outcome == "active"
    assert trainer.gxpo.report.loss == pytest.approx(loss.item(), abs=1e-6)
    assert trainer.gxpo.report.grad_norms == pytest.approx(opt.report.grad_norms, rel=1e-4)
    assert forgetful.gxpo.report.grad_norms != pytest.approx(opt.report.grad_norms, rel=1e-2)
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_every_pass_is_of_the_same_tokens(run: Callable[..., GRPOTrainer]) -> None:
    """With top_entropy_quantile only some tokens count. Chosen anew at theta1 they would be others, and the ratio would
    measure that."""
    chosen: list[Tensor] = []

    class Watches(GXPOTrainer):
        def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
            chosen.append(super().get_high_entropy_mask(*args, **kwargs))
            return chosen[-1]

    run(Watches, gxpo={"gate": None}, max_steps=1, **SETTINGS["top entropy"] | {"gradient_accumulation_steps": 2})
    first, second = chosen[:2]
    assert not torch.equal(first, second)
    assert [a is b for a, b in zip(chosen, [first, second] * 3, strict=True)] == [True] * 6


def test_another_models_log_probabilities_are_not_taken_for_the_policys(run: Callable[..., GRPOTrainer]) -> None:
    """A loss that asks a teacher, after the policy: its answer as the old log-probabilities would be another loss."""

    class AsksATeacher(GXPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            ids, mask = (
                torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask")
            )
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, inputs["completion_ids"].size(1))
            return loss

    asks, does_not = (run(cls, gxpo={"gate": None}, beta=0.1) for cls in (AsksATeacher, GXPOTrainer))
    assert passes(asks) == [3, 3, 3, 3]
    assert same(weights(asks), weights(does_not))


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


def test_nothing_is_recorded_while_the_gate_is_closed(run: Callable[..., GRPOTrainer]) -> None:
    """A batch of long completions kept for nothing is memory that a plain trainer has."""
    kept: list[int] = []

    class Watches(GXPOTrainer):
        def _gxpo_replay(self, model: Any) -> None:
            kept.append(len(self._gxpo_batches))
            super()._gxpo_replay(model)

    run(Watches, gxpo=CLOSED)
    run(Watches, gxpo={"gate": None}, max_steps=1)
    assert kept == [0, 0, 0, 0, 1]


def test_without_replay_rng_the_passes_draw_their_own_numbers(run: Callable[..., GRPOTrainer]) -> None:
    trainer = run(gxpo={"gate": None, "replay_rng": False}, learning_rate=0.0, **SETTINGS["dropout"])
    assert len(set(trainer.gxpo.report.grad_norms)) == 3


def test_an_adaptive_entropy_bonus_follows_the_first_pass(run: Callable[..., GRPOTrainer]) -> None:
    """Otherwise the bonus is steered by the entropy at a point that the policy only passes through."""
    runs = [run(cls, max_steps=1, **SETTINGS["adaptive entropy"]) for cls in (GRPOTrainer, GXPOTrainer)]
    assert passes(runs[1]) == [3]
    for name in ("entropy_coef", "_last_world_entropy", "_entropy_window_stats"):
        assert getattr(runs[0], name) == getattr(runs[1], name), name


def test_entropy_is_supplied_to_a_gate_that_wants_it(run: Callable[..., GRPOTrainer]) -> None:
    """Otherwise the gate that SFPO uses cannot be had, or watches another figure than the log shows."""
    trainer = run(gxpo={"gate": Gate("supplied")}, **SETTINGS["accumulation"])
    steps = trainer.state.log_history[:-1]
    assert [entry["gxpo/statistic"] for entry in steps] == pytest.approx([entry["entropy"] for entry in steps])
    seldom = run(gxpo={"gate": Gate("supplied")}, logging_steps=4, **SETTINGS["accumulation"])
    assert seldom.gxpo.report.statistic == trainer.gxpo.report.statistic  # of the step, not of all since the last log


def test_an_optimizer_passed_in_is_wrapped(make: Callable[..., GRPOTrainer]) -> None:
    """Otherwise who brings an optimizer, or trains twice, trains without GXPO or with two around each other."""
    trainer = make(gxpo={"horizon": 3})
    trainer.optimizer = sgd = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    for _ in range(2):
        trainer.train()
        assert trainer.gxpo.base is sgd
        assert passes(trainer) == [3, 3, 3, 3]
    other = make(gxpo={"horizon": 3})
    other.optimizer = GXPO(torch.optim.SGD(other.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="pass its base optimizer"):
        other.train()


# -------------------------------------------------------------------------------- checkpoints


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


# ----------------------------------------------------------------------------------- failures


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


# ----------------------------------------------------------------------------------- refusals


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
