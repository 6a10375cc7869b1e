"""The small autoregressive policies: right answers, exact probabilities, runs that do not touch each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from gxpo_reference.grpo_loss import grpo_loss
from gxpo_toy_tasks.engine import Draws, Params, Rule, Runs, Trainer
from gxpo_toy_tasks.tasks import sequences
from gxpo_toy_tasks.tasks.sequences import PROBLEMS, WIDTH, SequenceTask

MODELS = ["gru", "transformer"]
GXPO = Rule("gxpo", fast=2, estimator="gradient")


def untrained(task: SequenceTask, seeds: list[int]) -> Params:
    rows = [task.untrained(torch.Generator().manual_seed(seed)) for seed in seeds]
    return {name: torch.stack([row[name] for row in rows]) for name in task.shapes}


def every_answer(task: SequenceTask) -> Tensor:
    """(answers, tokens)"""
    return torch.tensor(list(itertools.product(range(task.base), repeat=task.problem.tokens)))


class PlainGRU(nn.Module):
    """One policy as anybody would write it: the whole sequence for every response, no run in front."""

    def __init__(self, theta: Params, base: int) -> None:
        super().__init__()
        self.base = base
        self.cell, self.out = nn.GRUCell(2 * base, WIDTH).double(), nn.Linear(WIDTH, base).double()
        with torch.no_grad():
            self.cell.bias_ih.zero_()  # the tokens' own entries
            for name, mine in self.named().items():
                mine.copy_(theta[name].mT if theta[name].ndim == 2 else theta[name])

    def named(self) -> Params:
        cell, out = self.cell, self.out
        matrices = {"tokens": cell.weight_ih, "hidden": cell.weight_hh, "out": out.weight}
        return {**matrices, "hidden_bias": cell.bias_hh, "out_bias": out.bias}

    def gradients(self) -> Params:
        return {name: t.grad.mT if t.ndim == 2 else t.grad for name, t in self.named().items()}

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, t, base): log-probabilities of what follows each of the tokens (batch, t)."""
        inputs, h, said = nn.functional.one_hot(tokens, 2 * self.base).double(), None, []
        for position in range(tokens.shape[1]):
            h = self.cell(inputs[:, position], h)
            said.append(self.out(h).log_softmax(dim=-1))
        return torch.stack(said, dim=1)


class PlainTransformer:
    """The same: every position of every response, and a mask."""

    def __init__(self, theta: Params, base: int) -> None:
        self.theta = {name: t.clone().requires_grad_() for name, t in theta.items()}

    def gradients(self) -> Params:
        return {name: t.grad for name, t in self.theta.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.theta[name].T, self.theta[f"{name}_bias"])

    def __call__(self, tokens: Tensor) -> Tensor:
        norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        x = self.theta["tokens"][tokens] + self.theta["positions"]
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.linear("attention", norm(x)).chunk(3, dim=-1)]
        seen = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.linear("mix", seen.transpose(1, 2).flatten(2))
        x = x + self.linear("down", self.linear("up", norm(x)).relu())
        return self.linear("out", norm(x)).log_softmax(dim=-1)


PLAIN = {"gru": PlainGRU, "transformer": PlainTransformer}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answers_are_right(name: str) -> None:
    """Or a policy would be taught, and praised for, something else than the README says."""
    task = SequenceTask(name)
    assert len(task.digits) == len(task.answers) == 10**task.problem.length
    assert len({tuple(d) for d in task.digits.tolist()}) == len(task.digits)
    for digits, answer in zip(task.digits.tolist(), task.answers.tolist(), strict=True):
        a, b, *rest = digits
        want = {"copy": [*digits][::-1], "add": [(a + rest[0]) % 10, (b + rest[-1]) % 10]}.get(name, sorted(digits))
        assert answer == want


@pytest.mark.parametrize("name", PROBLEMS)
def test_held_out_prompts_are_never_trained_on(name: str) -> None:
    """Or the accuracy would be one of prompts that the policy has been drilled on."""
    task, small = SequenceTask(name), SequenceTask(name, base=3)
    held_out = set(range(len(task.digits))) - set(task.training.tolist())
    assert len(held_out) == len(task.digits) // 5
    assert len(task.measured) == 200
    assert set(task.measured.tolist()) <= held_out
    drawn = torch.cat([task.prompts(Draws([0, 1], step)).flatten() for step in range(100)])
    assert not held_out & set(drawn.tolist())
    assert torch.equal(task.measured, SequenceTask(name, "transformer").measured), "the same for every policy"
    everything = list(range(3**small.problem.length))
    assert sorted(small.training.tolist()) == sorted(small.measured.tolist()) == everything


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_probabilities_sum_to_one_over_all_answers(name: str, model: str) -> None:
    """Or what the loss moves is not the log-probability of anything."""
    task = SequenceTask(name, model, base=3)
    theta, answers = untrained(task, [0, 1]), every_answer(task)
    prompts = torch.arange(len(task.digits)).expand(2, -1)
    logps = task.logps(theta, prompts, answers.expand(2, prompts.shape[1], -1, -1))
    assert logps.shape == (2, prompts.shape[1], len(answers), task.problem.tokens)
    torch.testing.assert_close(logps.sum(dim=-1).exp().sum(dim=-1), torch.ones(prompts.shape).double())


@pytest.mark.parametrize("model", MODELS)
def test_pass_at_1_is_the_probability_of_the_right_answer(model: str) -> None:
    """Or every curve would show something else than how often the policy is right."""
    task = SequenceTask("sort3", model, base=3)
    theta, answers = untrained(task, [0, 1]), every_answer(task)
    prompts = torch.arange(len(task.digits)).expand(2, -1)
    actions = answers.expand(2, prompts.shape[1], -1, -1)
    chance = task.logps(theta, prompts, actions).sum(dim=-1).exp()
    rewards = task.rewards(prompts, actions, Draws([0, 1], 0))
    assert torch.equal(rewards.sum(dim=-1), torch.ones(prompts.shape).long()), "one answer is right"
    torch.testing.assert_close(task.accuracy(theta), (chance * rewards).sum(dim=-1).mean(dim=1))


@pytest.mark.parametrize("model", MODELS)
def test_samples_come_as_often_as_their_probabilities_say(model: str) -> None:
    """Sampled from one policy and scored as another, training would be off-policy from the first step."""
    task = SequenceTask("add", model, base=2)
    task.groups, task.responses = 2, 20_000
    theta, prompts = untrained(task, [0, 1]), torch.tensor([[3, 8], [5, 12]])
    theta["out"] *= 5
    actions = task.sample(theta, prompts, Draws([0, 1], 0))
    assert actions.shape == (2, 2, 20_000, 2)
    answers = every_answer(task)
    seen = (actions[:, :, :, None] == answers).all(dim=-1).double().mean(dim=2)
    said = task.logps(theta, prompts, answers.expand(2, 2, -1, -1)).sum(dim=-1).exp()
    torch.testing.assert_close(seen, said, rtol=0, atol=0.018)  # five standard deviations
    assert (said.amax(dim=-1) - said.amin(dim=-1)).min() > 0.15, "uniform policies would prove little"


@pytest.mark.parametrize("model", MODELS)
def test_what_is_said_later_does_not_change_what_was_said_before(model: str) -> None:
    """A policy that sees its answer ahead of time would be perfect in training and at a loss in sampling."""
    task = SequenceTask("copy", model)
    theta, prompts = untrained(task, [0]), torch.tensor([[1234]])
    answers = torch.tensor([[[[4, 3, 2, 1], [4, 3, 9, 0]]]])
    logps = task.logps(theta, prompts, answers)[0, 0]
    torch.testing.assert_close(logps[0, :2], logps[1, :2], rtol=1e-12, atol=0)
    assert not torch.allclose(logps[0, 2:], logps[1, 2:])


@pytest.mark.parametrize("model", MODELS)
def test_a_row_beside_others_is_the_row_alone(model: str) -> None:
    """Or the spread over seeds would be one run seen several times over, and a rate's curve would depend on the
    others that it was compared with."""
    task = SequenceTask("sort3", model)
    many = Trainer(task, GXPO, Runs([0, 1], [3e-4, 5e-3]), dtype=torch.float64)
    alone = Trainer(task, GXPO, Runs([1], [5e-3]), dtype=torch.float64)
    start = alone.theta
    for step in range(6):
        many.step(step)
        alone.step(step)
    torch.testing.assert_close(many.theta[3:], alone.theta, rtol=0, atol=1e-10)
    torch.testing.assert_close(many.score()[3:], alone.score(), rtol=0, atol=1e-10)
    assert (alone.theta - start).abs().max() > 1e-2
    assert len(set(many.score().tolist())) == 4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_one_ordinary_model(name: str, model: str) -> None:
    """The shared prompts and the batched matrices are for speed; a different gradient would be a different model."""
    task = SequenceTask(name, model)
    task.responses = 4
    theta = untrained(task, [3, 4, 5])
    at, old = (
        {key: t + 0.02 * torch.randn(t.shape, generator=rng) for key, t in theta.items()}
        for rng in (torch.Generator().manual_seed(n) for n in range(2))
    )
    batch = task.rollouts(old, theta, Draws([3, 4, 5], 0))
    batch.advantages.copy_(torch.randn(batch.advantages.shape, generator=torch.Generator().manual_seed(2)))
    asked = {key: t.requires_grad_() for key, t in at.items()}
    task.loss(asked, batch).backward()
    for row in range(3):
        plain = PLAIN[model]({key: t[row].detach() for key, t in at.items()}, task.base)
        answers = batch.actions[row].flatten(0, 1)
        digits = task.digits[batch.prompts[row]].repeat_interleave(task.responses, dim=0)
        said = plain(torch.cat([digits, answers[:, :-1] + task.base], dim=1))[:, task.problem.length - 1 :]
        logps = said.gather(2, answers[..., None])[..., 0]
        old_logps, advantages, ref_logps = (
            t[row].flatten(0, 1) for t in (batch.old_logps, batch.advantages, batch.ref_logps)
        )
        loss, _ = grpo_loss(logps, old_logps, advantages, clip=task.clip, ref_logps=ref_logps, beta=task.beta)
        loss.backward()
        for key, want in plain.gradients().items():
            assert want.abs().max() > 1e-5
            torch.testing.assert_close(asked[key].grad[row], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
def test_pretraining_reaches_the_level_and_a_seed_is_a_seed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two comparisons with the same seeds would start from different policies."""
    task, there = SequenceTask("sort3", model), {}
    for seeds in ([0, 1, 2], [2], [7, 2, 0]):
        monkeypatch.setattr(sequences, "_pretrained", {})  # as in a new process
        first = task.initial(seeds)
        accuracy = task.accuracy(first)
        assert ((accuracy >= task.level) & (accuracy < task.level + 0.12)).all(), "weakly, not well"
        for row, seed in enumerate(seeds):
            for key, t in first.items():
                torch.testing.assert_close(t[row], there.setdefault((seed, key), t[row]), rtol=0, atol=1e-6)
    again = SequenceTask("sort3", model).initial([0, 2, 0])
    assert all(torch.equal(again[key][0], again[key][2]) for key in again)
    assert all(torch.equal(again[key][1], first[key][1]) for key in again)
    assert not torch.equal(again["out"][0], again["out"][1])


def test_pretraining_that_gets_nowhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a task too hard to start would be seen only as curves that never rise."""
    monkeypatch.setattr(SequenceTask, "patience", 3)
    with pytest.raises(RuntimeError, match=r"add: pass@1 0\.3 not reached in 3 steps, seeds \[9876\]"):
        SequenceTask("add").initial([9876])


def test_handing_out_parameters_does_not_hand_out_the_store() -> None:
    """Or training one comparison in place would move where the next one starts."""
    task = SequenceTask("sort3")
    theta = task.initial([0])
    before = theta["out"].clone()
    theta["out"].zero_()
    assert torch.equal(task.initial([0])["out"], before)


@pytest.mark.parametrize("model", MODELS)
def test_training_in_float32_learns(model: str) -> None:
    """The setting that the curves are made in: rewards must pay."""
    task = SequenceTask("sort3", model)
    assert task.name == ("sort3" if model == "gru" else "sort3-transformer")
    trainer = Trainer(task, GXPO, Runs([0, 1], [2e-3]))
    before = trainer.score()
    for step in range(25):
        trainer.step(step)
    assert trainer.theta.dtype == torch.float32
    assert (trainer.score() > before + 0.08).all()
