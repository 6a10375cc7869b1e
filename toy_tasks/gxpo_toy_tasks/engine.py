"""Many training runs at once: seeds and learning rates side by side, one autograd call for all of them.

Every run is a row. theta is (runs, parameters), flat, so that ten runs of a small network cost little more than one:
what is slow in small networks is Python, not arithmetic. The formulas are gxpo.py's own (ratio, q, clipping, gate);
what is written here is the plumbing for rows, and tests/test_toy_engine.py holds it against the real `gxpo.GXPO`, run
by run and step by step.

    runs = Runs(seeds=[0, 1, 2], lrs=[2e-3, 1e-2])              # six rows
    curves = train(task, RULES["gxpo"], runs, steps=200)
    curves.accuracy                                             # (steps + 1, runs)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gxpo import Gate, GateState, clip_coefficient, extrapolation_scale, retention_ratio

Params = dict[str, Tensor]  # name -> (runs, *shape), views of theta
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of q over a run's coordinates, kept for every active step


class Task(Protocol):
    """Something to learn: a policy, rollouts, a loss and an exact score, all for many runs at once."""

    name: str
    shapes: dict[str, tuple[int, ...]]  # of one run's parameters

    def initial(self, seeds: Sequence[int]) -> Params:
        """The parameters to start from, a row a seed; a seed gives the same whatever stands beside it."""
        ...

    def rollouts(self, theta: Params, reference: Params, draws: Draws) -> Any:
        """This step's batch, sampled from the policy at theta; it has the policy's `entropy` (runs,). reference: the
        parameters that training started from."""
        ...

    def loss(self, theta: Params, batch: Any) -> Tensor:
        """A number: the rows' losses added up, so that its gradient is every row's own. Differentiable by theta."""
        ...

    def accuracy(self, theta: Params) -> Tensor:
        """(runs,): pass@1 or expected reward, exact, in [0, 1]."""
        ...


@dataclass(frozen=True)
class Rule:
    """An update rule. fast: how many real steps lead to the virtual point; 0 for a plain step, 2 for GXPO."""

    name: str
    fast: int = 0
    epochs: int = 1  # plain steps on one batch
    horizon: int = 5
    alpha: float = 0.8
    estimator: str = ""  # "gradient", "displacement" or "tensor"; "" moves without extrapolating (SFPO)
    optimizer_state: str = "keep"
    gate: Gate = Gate("never")
    lr_times: float = 1.0  # multiplies the learning rate

    @property
    def passes(self) -> int:
        """Backward passes of an active step."""
        return self.fast + 1 if self.fast else self.epochs


@dataclass(frozen=True)
class Runs:
    """The rows: every learning rate with every seed, rates outermost."""

    seeds: Sequence[int]
    lrs: Sequence[float]

    def __len__(self) -> int:
        return len(self.seeds) * len(self.lrs)

    @cached_property
    def seed(self) -> list[int]:
        return [seed for _ in self.lrs for seed in self.seeds]

    @cached_property
    def lr(self) -> Tensor:
        """(runs, 1)"""
        return torch.tensor([[lr] for lr in self.lrs for _ in self.seeds], dtype=torch.float64)


class Draws:
    """Random numbers of one step: rows of the same seed get the same, under every rule and rate."""

    def __init__(self, seeds: Sequence[int], step: int, device: str = "cpu") -> None:
        self.seeds, self.device = seeds, device
        self.generators = {
            seed: torch.Generator().manual_seed(1_000_003 * seed + step) for seed in dict.fromkeys(seeds)
        }

    def uniform(self, *shape: int) -> Tensor:
        """(runs, *shape) in [0, 1), float64."""
        drawn = {s: torch.rand(shape, generator=g, dtype=torch.float64) for s, g in self.generators.items()}
        return torch.stack([drawn[s] for s in self.seeds]).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(runs, *shape) in [0, high)."""
        return (self.uniform(*shape) * high).long()


@dataclass
class Curves:
    """What a training left behind; steps in front, runs behind."""

    accuracy: Tensor  # (steps + 1, runs); the first before any step
    passes: Tensor  # (steps + 1, runs): backward passes so far
    active: Tensor  # (steps, runs): whether a step extrapolated
    q: Tensor  # (steps, runs, quantiles); nan where it did not
    z: Tensor  # (steps, runs): the gate's score; nan where it gave none
    multiplier: Tensor  # (steps, runs): mean over coordinates of thetaK's move, in steps
    seconds: dict[str, float] = field(default_factory=dict)  # of all rows: "rollouts", "update", "accuracy"


@dataclass
class _State:
    """An optimizer's, by rows."""

    n: Tensor  # (runs, 1): updates so far
    m: Tensor
    v: Tensor

    def where(self, rows: Tensor, other: _State) -> _State:
        """This one in `rows`, `other` elsewhere."""
        return _State(*(torch.where(rows, a, b) for a, b in ((self.n, other.n), (self.m, other.m), (self.v, other.v))))


Update = Callable[[Tensor, _State, Tensor], tuple[Tensor, _State]]


def adamw(lr: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Update:
    """torch.optim.AdamW without weight decay. lr: (runs, 1)."""

    def update(theta: Tensor, s: _State, g: Tensor) -> tuple[Tensor, _State]:
        n = s.n + 1
        m, v = torch.lerp(s.m, g, 1 - betas[0]), betas[1] * s.v + (1 - betas[1]) * g * g
        root = v.sqrt() / (1 - betas[1] ** n).sqrt() + eps
        return theta - lr / (1 - betas[0] ** n) * m / root, _State(n, m, v)

    return update


def sgd(lr: Tensor) -> Update:
    """Plain gradient descent. lr: (runs, 1)."""
    return lambda theta, s, g: (theta - lr * g, s)


def momentum(lr: Tensor, mu: float = 0.9) -> Update:
    """torch.optim.SGD with momentum. lr: (runs, 1)."""

    def update(theta: Tensor, s: _State, g: Tensor) -> tuple[Tensor, _State]:
        m = mu * s.m + g
        return theta - lr * m, _State(s.n, m, s.v)

    return update


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "momentum": momentum}


class Trainer:
    """Rows in training under one rule; `step` makes one outer step of each."""

    def __init__(
        self,
        task: Task,
        rule: Rule,
        runs: Runs,
        *,
        optimizer: str = "adamw",
        max_grad_norm: float | None = 1.0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.task, self.rule, self.runs, self.max_grad_norm, self.device = task, rule, runs, max_grad_norm, device
        self.theta = self.start(task, runs).to(device, dtype)
        self.reference = self.theta
        self.sizes = [math.prod(shape) for shape in task.shapes.values()]
        self.tensor = torch.repeat_interleave(torch.tensor(self.sizes)).to(device)  # of each coordinate
        zeros = torch.zeros_like(self.theta)
        self.state = _State(zeros[:, :1], zeros, zeros)
        self.update = OPTIMIZERS[optimizer](rule.lr_times * runs.lr.to(device, dtype))
        self.gates = [GateState() for _ in range(len(runs))]
        self.passes = torch.zeros(len(runs), dtype=torch.long)
        self.seconds = {"rollouts": 0.0, "update": 0.0, "accuracy": 0.0}
        # On a CPU the processor's own time, which other programs (and the comparison's other worker) leave alone.
        self.clock = time.process_time if device == "cpu" else time.perf_counter

    @staticmethod
    def start(task: Task, runs: Runs) -> Tensor:
        seeds = list(dict.fromkeys(runs.seed))
        first = task.initial(seeds)
        flat = torch.cat([first[name].reshape(len(seeds), -1) for name in task.shapes], dim=1)
        return flat[[seeds.index(seed) for seed in runs.seed]]

    def views(self, theta: Tensor) -> Params:
        parts = theta.split(self.sizes, dim=1)
        return {name: p.view(-1, *shape) for p, (name, shape) in zip(parts, self.task.shapes.items(), strict=True)}

    def gradient(self, theta: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(gradient clipped row by row, norms before: (runs, 1))."""
        theta = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.task.loss(self.views(theta), batch), theta)
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        c = [clip_coefficient(size, self.max_grad_norm) for size in norm[:, 0].tolist()]
        return g * torch.tensor(c, dtype=g.dtype, device=self.device)[:, None], norm

    def per_tensor(self, values: Tensor) -> Tensor:
        """Sums over each tensor, given to each of its coordinates."""
        sums = values.new_zeros(len(values), len(self.sizes)).index_add_(1, self.tensor, values)
        return sums[:, self.tensor]

    def scale(self, u0: Tensor, u1: Tensor, c0_g0: Tensor, c1_g1: Tensor) -> Tensor:
        """q of every coordinate."""
        if self.rule.estimator == "tensor":
            r = self.per_tensor(u0 * u1) / self.per_tensor(u0 * u0)
            q = extrapolation_scale(r.nan_to_num(0.0, 0.0, 0.0).clamp(-2.0, 3.0), self.rule.horizon)
            return torch.where(r.isfinite(), q, 1.0)
        before, after = (c0_g0, c1_g1) if self.rule.estimator == "gradient" else (u0, u1)
        count = torch.tensor(self.sizes, dtype=before.dtype, device=self.device)[self.tensor]
        rms = (self.per_tensor(before * before) / count).sqrt()
        return extrapolation_scale(retention_ratio(before / rms, after / rms, 1.0), self.rule.horizon)

    def step(self, number: int) -> dict[str, Tensor]:
        """One outer step of every row; what there is to record of it."""
        rule, began = self.rule, self.clock()
        with torch.no_grad():
            draws = Draws(self.runs.seed, number, self.device)
            batch = self.task.rollouts(self.views(self.theta), self.views(self.reference), draws)
        rolled_out = self.clock()
        theta0, s0 = self.theta, self.state
        g0, n0 = self.gradient(theta0, batch)
        theta1, s1 = self.update(theta0, s0, g0)
        opened = [rule.fast > 0 and rule.gate.is_open(state) for state in self.gates]
        # A zero gradient, all advantages were, is an ordinary single pass; a non-finite one is skipped.
        sound = n0.isfinite()
        active = asked = torch.tensor(opened, device=self.device)[:, None] & sound & (n0 > 0)
        seen: dict[str, Tensor] = {}
        if active.any():
            end, s_end, finite, seen = self.look_ahead(batch, theta0, s0, theta1, s1, g0, n0)
            active = active & finite
            theta1, s1 = torch.where(active, end, theta1), s_end.where(active, s1)
        for _ in range(rule.epochs - 1):
            g, _ = self.gradient(theta1, batch)
            theta1, s1 = self.update(theta1, s1, g)
        self.theta, self.state = torch.where(sound, theta1, theta0), s1.where(sound, s0)
        self.passes += torch.where(asked[:, 0].cpu(), rule.passes, rule.epochs)
        record = self.judge(active[:, 0].tolist(), n0, batch, seen)
        done = self.clock()
        self.seconds["rollouts"] += rolled_out - began
        self.seconds["update"] += done - rolled_out
        return record

    def look_ahead(
        self, batch: Any, theta0: Tensor, s0: _State, theta1: Tensor, s1: _State, g0: Tensor, n0: Tensor
    ) -> tuple[Tensor, _State, Tensor, dict[str, Tensor]]:
        """(theta', s', rows in which all was finite, q, multiplier and the statistics) of an active step."""
        rule, theta, s, g1, finite = self.rule, theta1, s1, g0, torch.ones_like(n0, dtype=torch.bool)
        for n in range(1, rule.fast):
            g, norm = self.gradient(theta, batch)
            finite &= norm.isfinite()
            g1 = g if n == 1 else g1
            theta, s = self.update(theta, s, g)
        q = self.scale(theta1 - theta0, theta - theta1, g0, g1) if rule.estimator else torch.ones_like(theta)
        tilde = theta0 + rule.alpha * q * (theta - theta0)
        g, norm = self.gradient(tilde, batch)
        end, s_end = self.update(tilde, s if rule.optimizer_state == "keep" else s0, g)
        cosine = (g0 * g).sum(dim=1) / (g0.norm(dim=1) * g.norm(dim=1))
        seen = {"q": q, "corrective_norm": norm[:, 0], "disagreement": 1 - cosine.nan_to_num(0.0).abs()}
        return end, s_end, finite & norm.isfinite(), seen

    def judge(self, active: list[bool], n0: Tensor, batch: Any, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the gates see the step."""
        rule, nan = self.rule, float("nan")
        figures = {**seen, "initial_norm": n0[:, 0], "supplied": batch.entropy}.get(rule.gate.statistic)
        scores = []
        for row, now in enumerate(active):
            h = float(figures[row]) if now and figures is not None else None
            self.gates[row], z, _ = rule.gate.after(self.gates[row], now, h)
            scores.append(nan if z is None else z)
        here = torch.tensor(active)
        record = {"active": here, "z": torch.tensor(scores, dtype=torch.float64)}
        record["q"] = torch.full((len(active), len(QUANTILES)), nan, dtype=torch.float64)
        record["multiplier"] = torch.ones(len(active), dtype=torch.float64)
        if "q" in seen and here.any():
            q = seen["q"].double().cpu()
            record["q"][here] = torch.from_numpy(np.quantile(q[here].numpy(), QUANTILES, axis=1).T)  # torch's is slow
            record["multiplier"][here] = 1 + rule.alpha * rule.fast * q[here].mean(dim=1)
        return record

    def score(self) -> Tensor:
        began = self.clock()
        with torch.no_grad():
            accuracy = self.task.accuracy(self.views(self.theta)).double().cpu()
        self.seconds["accuracy"] += self.clock() - began
        return accuracy


def train(
    task: Task,
    rule: Rule,
    runs: Runs,
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
    enough: Callable[[Tensor], bool] = lambda accuracy: False,
    **settings: Any,
) -> Curves:
    """Train every row for `steps` outer steps, or until `enough` says so of the accuracies (runs,). settings: as
    Trainer takes them."""
    trainer = Trainer(task, rule, runs, **settings)
    accuracy, passes = [trainer.score()], [trainer.passes.clone()]
    records = []
    for step in range(steps):
        records.append(trainer.step(step))
        accuracy.append(trainer.score())
        passes.append(trainer.passes.clone())
        on_step(step)
        if enough(accuracy[-1]):
            break
    made = {key: torch.stack([r[key] for r in records]) for key in records[0]}
    return Curves(torch.stack(accuracy), torch.stack(passes), seconds=trainer.seconds, **made)
