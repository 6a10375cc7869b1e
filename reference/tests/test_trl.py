"""GXPO inside the real TRL GRPOTrainer, on models of a few thousand random numbers.

If these fail, people who train with reference/trainers/trl_gxpo.py train something else than GXPO, or pay for it with
rollouts, logs or checkpoints that differ from those of the trainer they know.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl_cases")  # which skips what needs TRL where there is none

from torch import Tensor
from trl import GRPOTrainer
from trl_cases import CLOSED, MARKS, SETTINGS, Counts, logs, passes, same, weights

from gxpo import GXPO, Gate
from gxpo_reference.grpo_loss import grpo_loss
from gxpo_reference.trainers import trl_example
from gxpo_reference.trainers.tiny_models import tiny_model
from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

pytestmark = MARKS


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


def test_the_replays_are_of_the_same_batch(run: Callable[..., GRPOTrainer]) -> None:
    """At a learning rate of 0 nothing moves, and three gradients of one batch are one gradient."""
    trainer = run(gxpo={"gate": None}, learning_rate=0.0, **SETTINGS["two iterations in one step"])
    for entry in trainer.state.log_history[:-1]:
        norms = [entry[f"gxpo/grad_norm_{which}"] for which in ("initial", "second", "corrective")]
        assert entry["gxpo/active"]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


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


# --------------------------------------------------------------------------------------------------- the step is GXPO's


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
