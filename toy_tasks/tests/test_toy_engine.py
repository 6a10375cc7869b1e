"""The batched engine against the real gxpo.GXPO, run by run and step by step: what it shows must be the method's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gxpo import GXPO, Gate
from gxpo_reference.baselines import GRPO, SFPO
from gxpo_toy_tasks.engine import OPTIMIZERS, Draws, Rule, Runs, Trainer, train
from gxpo_toy_tasks.tasks.bandit_tasks import BanditTask, ContextualTask

STEPS = 30
SPIKY = Gate("corrective_norm", window=5, threshold=1.0, patience=1)
RULES = {
    "grpo": Rule("grpo"),
    "epochs": Rule("epochs", epochs=3),
    "scaled": Rule("scaled", lr_times=4.0),
    "sfpo": Rule("sfpo", fast=3, horizon=3, gate=Gate("supplied", window=5, threshold=1.0, patience=1, two_sided=True)),
    "gxpo": Rule("gxpo", fast=2, estimator="gradient"),
    "odd, restore": Rule("gxpo", fast=2, horizon=7, alpha=0.5, estimator="gradient", optimizer_state="restore"),
    "displacement": Rule("gxpo", fast=2, horizon=4, estimator="displacement"),
    "tensor": Rule("gxpo", fast=2, horizon=5, estimator="tensor"),
    "gated": Rule("gxpo", fast=2, estimator="gradient", gate=SPIKY),
    "ema": Rule("gxpo", fast=2, estimator="gradient", gate=Gate("initial_norm", "ema", threshold=1.0, patience=1)),
    "disagreement": Rule("gxpo", fast=2, estimator="gradient", gate=Gate("disagreement", window=5, cooldown=3)),
    "budget": Rule("gxpo", fast=2, estimator="gradient", gate=Gate("never", max_active_steps=7)),
}


def real(rule: Rule, base: torch.optim.Optimizer) -> GXPO:
    """The class that `rule` stands for."""
    if not rule.fast:
        return GRPO(base, max_grad_norm=1.0)
    if not rule.estimator:
        return SFPO(base, horizon=rule.horizon, alpha=rule.alpha, max_grad_norm=1.0, gate=rule.gate)
    return GXPO(
        base,
        horizon=rule.horizon,
        alpha=rule.alpha,
        estimator=rule.estimator,
        optimizer_state=rule.optimizer_state,
        max_grad_norm=1.0,
        gate=rule.gate,
    )


def by_hand(task: Any, rule: Rule, seed: int, lr: float, optimizer: str) -> dict[str, list]:
    """One run, an ordinary torch training loop around the ordinary optimizer."""
    theta = {name: t[0].double().clone().requires_grad_() for name, t in task.initial([seed]).items()}
    reference = {name: t.detach()[None].clone() for name, t in theta.items()}
    lr = lr * rule.lr_times
    base = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
        "sgd": lambda p: torch.optim.SGD(p, lr=lr),
        "momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
    }
    opt = real(rule, base[optimizer](theta.values()))
    seen: dict[str, list] = {"accuracy": [], "passes": [], "active": [], "z": [], "multiplier": []}

    def row() -> dict[str, torch.Tensor]:
        return {name: t[None] for name, t in theta.items()}

    for step in range(STEPS):
        with torch.no_grad():
            batch = task.rollouts(row(), reference, Draws([seed], step))
        passes = 0
        for _ in range(rule.epochs):
            for n in opt.passes():
                loss = task.loss(row(), batch)
                opt.observe(
                    loss=loss,
                    **({"statistic": float(batch.entropy)} if rule.gate.statistic == "supplied" and n == 0 else {}),
                )
                loss.backward()
            passes += opt.report.passes
        seen["passes"].append(passes)
        seen["active"].append(opt.report.outcome == "active")
        seen["z"].append(opt.report.z)
        seen["multiplier"].append(opt.report.multiplier)
        with torch.no_grad():
            seen["accuracy"].append(float(task.accuracy(row())))
    return seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
def test_every_row_is_the_run_that_gxpo_py_makes(name: str, optimizer: str) -> None:
    """A table about an engine that is not GXPO would be a table about nothing."""
    rule, task = RULES[name], ContextualTask(contexts=5, arms=4)
    runs = Runs(seeds=[3, 4], lrs={"adamw": [0.01, 0.05], "sgd": [0.5, 2.0], "momentum": [0.05, 0.2]}[optimizer])
    curves = train(task, rule, runs, STEPS, optimizer=optimizer, dtype=torch.float64)
    for row, (lr, seed) in enumerate((lr, seed) for lr in runs.lrs for seed in runs.seeds):
        want = by_hand(task, rule, seed, lr, optimizer)
        assert curves.passes[1:, row].diff(prepend=torch.zeros(1, dtype=torch.long)).tolist() == want["passes"]
        assert curves.active[:, row].tolist() == (want["active"] if rule.fast else [False] * STEPS)
        torch.testing.assert_close(
            curves.accuracy[1:, row], torch.tensor(want["accuracy"]).double(), rtol=1e-6, atol=1e-8
        )
    if name in ("gated", "budget"):
        assert curves.active.any()
        assert not curves.active.all(), "the gate should have closed in this case"


def test_rows_do_not_touch_each_other() -> None:
    task, rule = BanditTask(), RULES["gxpo"]
    many = train(task, rule, Runs([0, 1, 2], [0.05, 0.2]), 15, dtype=torch.float64)
    alone = train(task, rule, Runs([1], [0.2]), 15, dtype=torch.float64)
    torch.testing.assert_close(many.accuracy[:, 4:5], alone.accuracy, rtol=1e-9, atol=0)


def test_the_same_seed_draws_the_same_under_every_rule_and_rate() -> None:
    """Or luck would be compared, not rules."""
    one, other = Draws([5, 6, 5], 3), Draws([6, 5], 3)
    a, b = one.uniform(4), other.uniform(4)
    assert torch.equal(a[0], a[2])
    assert torch.equal(a[0], b[1])
    assert not torch.equal(a[0], Draws([5], 4).uniform(4)[0])


def test_a_run_that_blows_up_does_not_spoil_the_others() -> None:
    task = ContextualTask(contexts=5, arms=4)
    both = train(task, RULES["gxpo"], Runs([0], [0.5, 1e300]), 10, optimizer="sgd", dtype=torch.float64)
    alone = train(task, RULES["gxpo"], Runs([0], [0.5]), 10, optimizer="sgd", dtype=torch.float64)
    torch.testing.assert_close(both.accuracy[:, :1], alone.accuracy, rtol=1e-9, atol=0)


def test_the_problems_expected_reward_is_the_bandits_own() -> None:
    task = BanditTask()
    trainer = Trainer(task, RULES["grpo"], Runs([0], [0.1]), dtype=torch.float64)
    logits = trainer.views(trainer.theta)["logits"][0].numpy()
    assert float(trainer.score()) == pytest.approx(task.problem.reward({"logits": logits}), rel=1e-12)
