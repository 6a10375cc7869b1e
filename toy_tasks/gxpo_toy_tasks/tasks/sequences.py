"""Small autoregressive policies that answer digit by digit; an answer is right as a whole, or worth nothing.

`sort3`, `sort4`: the digits in order. `add`: two numbers of two digits, digit by digit modulo 10. `copy`: four digits,
reversed. The policy is a GRU or a causal transformer of one layer, weakly pretrained: right about three times in ten.

    task = SequenceTask("sort3")                                # or model="transformer"
    curves = train(task, Rule("gxpo", fast=2, estimator="gradient"), Runs([0, 1, 2], [3e-4]), steps=240)

Every tensor of parameters has the runs in front, and all is batched matrix products over them. The prompt is read once
for all responses to it. Letters in shapes: r runs, g prompts, n responses to each, w width, d digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gxpo_toy_tasks.engine import Draws, Params
from gxpo_toy_tasks.tasks.policy import PolicyTask, choose

WIDTH = 32


@dataclass(frozen=True)
class Problem:
    """Prompts of `length` digits, all of them; the answers follow from them."""

    length: int
    tokens: int  # of an answer
    answer: Callable[[Tensor, int], Tensor]  # (prompts, length) and the base -> (prompts, tokens)
    pace: float = 1.0  # multiplies the model's rate in pretraining


PROBLEMS = {
    "sort3": Problem(3, 3, lambda prompts, base: prompts.sort(dim=-1).values),
    "sort4": Problem(4, 4, lambda prompts, base: prompts.sort(dim=-1).values),
    "add": Problem(4, 2, lambda prompts, base: (prompts[:, :2] + prompts[:, 2:]) % base, pace=2.0),  # 12 + 39 = 41
    "copy": Problem(4, 4, lambda prompts, base: prompts.flip(-1)),
}


def matrix(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {name: (rows, columns), f"{name}_bias": (columns,)}


def linear(theta: Params, name: str, x: Tensor) -> Tensor:
    """Each run its own matrix. x: (r, ..., rows) -> (r, ..., columns)"""
    return torch.baddbmm(theta[f"{name}_bias"][:, None], x.flatten(1, -2), theta[name]).view(*x.shape[:-1], -1)


def normed(x: Tensor) -> Tensor:
    """Without a gain and a bias: the matrix that follows has them. x: (..., w)"""
    return F.layer_norm(x, x.shape[-1:])


def look_up(table: Tensor, tokens: Tensor) -> Tensor:
    """Each run its own table. table: (r, entries, w), tokens: (r, ...) -> (r, ..., w)"""
    runs, entries, _ = table.shape
    first = entries * torch.arange(runs, device=tokens.device)
    return F.embedding(tokens + first.view(-1, *[1] * (tokens.ndim - 1)), table.flatten(0, 1))


def say(theta: Params, x: Tensor) -> Tensor:
    """Log-probabilities of the next digit. x: (r, g, n, w) -> (r, d, g, n): so, log_softmax is twenty times as fast."""
    logits = torch.baddbmm(theta["out_bias"][:, :, None], theta["out"].mT, x.flatten(1, 2).mT)
    return logits.log_softmax(dim=1).unflatten(2, x.shape[1:3])


class Model(Protocol):
    """What is left of a prompt, and of each answer so far, is a state; each has log-probabilities of the next digit."""

    shapes: dict[str, tuple[int, ...]]
    rate: float  # in pretraining

    def read(self, theta: Params, prompts: Tensor) -> tuple[Any, Tensor]:
        """(state, log-probabilities (r, d, g, 1)) after the prompts' digits (r, g, length)."""
        ...

    def go_on(self, theta: Params, state: Any, digits: Tensor) -> tuple[Any, Tensor]:
        """(state, log-probabilities (r, d, g, n)) after one more digit (r, g, n) of every answer."""
        ...


class GRU:
    """torch.nn.GRUCell and a linear layer. Digits of the prompt and of the answer are different tokens."""

    rate = 0.01

    def __init__(self, problem: Problem, base: int) -> None:
        self.base = base
        self.shapes = {
            "tokens": (2 * base, 3 * WIDTH),  # what a token adds to the gates: reset, update, new
            **matrix("hidden", WIDTH, 3 * WIDTH),
            **matrix("out", WIDTH, base),
        }

    def cell(self, theta: Params, h: Tensor, x: Tensor) -> Tensor:
        """The next h (r, g, n, w). h: (r, g, n, w), g or n may be 1; x, from the tokens: (r, g, n, 3 w)"""
        y = linear(theta, "hidden", h)  # before h is spread over the responses
        (x_gates, x_new), (y_gates, y_new) = (t.split((2 * WIDTH, WIDTH), dim=-1) for t in (x, y))
        reset, update = (x_gates + y_gates).sigmoid().chunk(2, dim=-1)
        return torch.lerp(torch.addcmul(x_new, reset, y_new).tanh(), h, update)

    def read(self, theta: Params, prompts: Tensor) -> tuple[Tensor, Tensor]:
        h = theta["hidden"].new_zeros(len(prompts), 1, 1, WIDTH)
        for x in look_up(theta["tokens"], prompts[:, :, None]).unbind(dim=-2):
            h = self.cell(theta, h, x)
        return h, say(theta, h)

    def go_on(self, theta: Params, state: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(theta, state, look_up(theta["tokens"], digits + self.base))
        return h, say(theta, h)


class Transformer:
    """One causal layer: attention of two heads, then a small MLP, each behind a normalisation; learned positions.

    With one layer, keys and values come from the tokens alone: only where a digit is to be said is anything else
    computed. The state is the keys and values so far.
    """

    heads, rate = 2, 0.003

    def __init__(self, problem: Problem, base: int) -> None:
        self.base, self.length = base, problem.length
        self.shapes = {
            "tokens": (2 * base, WIDTH),
            "positions": (problem.length + problem.tokens - 1, WIDTH),
            **matrix("attention", WIDTH, 3 * WIDTH),  # queries, keys, values
            **matrix("mix", WIDTH, WIDTH),
            **matrix("up", WIDTH, 2 * WIDTH),
            **matrix("down", 2 * WIDTH, WIDTH),
            **matrix("out", WIDTH, base),
        }

    def layer(self, theta: Params, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `say` says. x, q: (r, g, n, w), at the last token; k, v: (r, g, n, t, w), of all tokens."""
        size = (self.heads, WIDTH // self.heads)
        q, k, v = (t.unflatten(-1, size) for t in (q, k, v))
        weights = ((q[..., None, :, :] * k).sum(dim=-1) / math.sqrt(size[1])).softmax(dim=-2)
        seen = (weights[..., None] * v).sum(dim=-3).flatten(-2)
        x = x + linear(theta, "mix", seen)
        within = linear(theta, "up", normed(x)).relu()
        x = x + linear(theta, "down", within)
        return say(theta, normed(x))

    def embed(self, theta: Params, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(x, [queries, keys, values]), each (..., w). tokens: (r, ...); positions: broadcast to x"""
        x = look_up(theta["tokens"], tokens) + positions
        qkv = linear(theta, "attention", normed(x))
        return x, list(qkv.chunk(3, dim=-1))

    def read(self, theta: Params, prompts: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, (q, k, v) = self.embed(theta, prompts[:, :, None], theta["positions"][:, None, None, : self.length])
        return (k, v), self.layer(theta, x[..., -1, :], q[..., -1, :], k, v)

    def go_on(
        self, theta: Params, state: tuple[Tensor, Tensor], digits: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at = state[0].shape[-2]
        x, (q, *new) = self.embed(theta, digits + self.base, theta["positions"][:, None, None, at])
        spread = (old.expand(*digits.shape, -1, -1) for old in state)
        k, v = (torch.cat([old, now[..., None, :]], dim=-2) for old, now in zip(spread, new, strict=True))
        return (k, v), self.layer(theta, x, q, k, v)


MODELS: dict[str, Callable[[Problem, int], Model]] = {"gru": GRU, "transformer": Transformer}
_pretrained: dict[tuple[str, int, int], Params] = {}  # by task, base and seed: one run's


class SequenceTask(PolicyTask):
    """One of PROBLEMS, to one of MODELS. base: digits are 0 to base - 1.

    Of 1000 prompts or more a fifth is held out, and accuracy is measured on (at most 200 of) those alone; of fewer,
    all are trained on and measured.
    """

    groups, responses = 8, 16
    level = 0.3  # of pass@1, where pretraining stops
    patience = 2000  # steps of pretraining at most

    def __init__(self, problem: str, model: str = "gru", base: int = 10) -> None:
        self.name = problem if model == "gru" else f"{problem}-{model}"
        self.problem, self.base = PROBLEMS[problem], base
        self.model = MODELS[model](self.problem, base)
        self.shapes = self.model.shapes
        every = torch.cartesian_prod(*[torch.arange(base)] * self.problem.length)
        self.digits, self.answers = every, self.problem.answer(every, base)
        shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        held_out = len(every) // 5 if len(every) >= 1000 else 0
        self.training = shuffled[held_out:]
        self.measured = shuffled[: min(held_out, 200)] if held_out else shuffled

    def initial(self, seeds: Sequence[int]) -> Params:
        """Pretrained until the level is reached; float64."""
        missing = [seed for seed in dict.fromkeys(seeds) if (self.name, self.base, seed) not in _pretrained]
        if missing:
            self.pretrain(missing)
        rows = [_pretrained[self.name, self.base, seed] for seed in seeds]
        return {name: torch.stack([row[name] for row in rows]) for name in self.shapes}

    def pretrain(self, seeds: Sequence[int], batch: int = 64, every: int = 3) -> None:
        """Adam on the right answers to random prompts. Each seed has its own draws, and leaves when it is there.

        In float64, in which it makes no difference worth speaking of who else is in the batch.
        """
        lr = self.model.rate * self.problem.pace
        rngs = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        rows = [self.untrained(rng) for rng in rngs.values()]
        theta = {name: torch.stack([row[name] for row in rows]) for name in self.shapes}
        m, v = ({name: torch.zeros_like(t) for name, t in theta.items()} for _ in range(2))
        for step in range(1, self.patience + 1):
            prompts = torch.stack([torch.randint(len(self.training), (batch,), generator=g) for g in rngs.values()])
            prompts = self.training[prompts]
            asked = {name: t.requires_grad_() for name, t in theta.items()}
            loss = -self.logps(asked, prompts, self.answers[prompts][:, :, None]).sum() / batch
            for (name, t), g in zip(theta.items(), torch.autograd.grad(loss, list(asked.values())), strict=True):
                m[name], v[name] = m[name].lerp(g, 0.1), v[name].lerp(g * g, 0.01)
                move = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
                theta[name] = (t - lr * move).detach()
            if step % every:
                continue
            with torch.no_grad():
                there = self.accuracy(theta) >= self.level
            for row, seed in enumerate(list(rngs)):
                if there[row]:
                    _pretrained[self.name, self.base, seed] = {name: t[row].clone() for name, t in theta.items()}
                    del rngs[seed]
            if not rngs:
                return
            if there.any():
                theta, m, v = ({name: t[~there] for name, t in params.items()} for params in (theta, m, v))
        raise RuntimeError(f"{self.name}: pass@1 {self.level} not reached in {self.patience} steps, seeds {list(rngs)}")

    def untrained(self, rng: torch.Generator) -> Params:
        """One run's, (*shape): uniform within 1 / sqrt(width), what stands for tokens and positions within 1."""
        draw = {name: torch.rand(shape, generator=rng, dtype=torch.float64) for name, shape in self.shapes.items()}
        bound = dict.fromkeys(self.shapes, float(WIDTH**-0.5)) | {"tokens": 1.0, "positions": 1.0}
        return {name: bound[name] * (2 * u - 1) for name, u in draw.items()}

    def prompts(self, draws: Draws) -> Tensor:
        """(r, g): places in `digits` and `answers`."""
        return self.training.to(draws.device)[draws.integers(len(self.training), self.groups)]

    def sample(self, theta: Params, prompts: Tensor, draws: Draws) -> Tensor:
        u = draws.uniform(self.groups, self.responses, self.problem.tokens)
        state, policy = self.model.read(theta, self.digits.to(prompts.device)[prompts])
        actions = [choose(policy.movedim(1, -1), u[..., 0])]
        for token in range(1, self.problem.tokens):
            state, policy = self.model.go_on(theta, state, actions[-1])
            actions.append(choose(policy.movedim(1, -1), u[..., token]))
        return torch.stack(actions, dim=-1)

    def logps(self, theta: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        """(r, g, n, tokens), by teacher forcing."""
        state, policy = self.model.read(theta, self.digits.to(prompts.device)[prompts])
        before, *others = actions.unbind(dim=-1)
        logps = [policy.expand(-1, -1, *before.shape[1:]).gather(1, before[:, None])]
        for token in others:
            state, policy = self.model.go_on(theta, state, before)
            logps.append(policy.gather(1, token[:, None]))
            before = token
        return torch.cat(logps, dim=1).movedim(1, -1)

    def rewards(self, prompts: Tensor, actions: Tensor, draws: Draws) -> Tensor:
        """Bool: whether the whole answer is right."""
        return (actions == self.answers.to(actions.device)[prompts][:, :, None]).all(dim=-1)

    def accuracy(self, theta: Params) -> Tensor:
        """pass@1, exact: there is one right answer, and this is the probability that it is given."""
        first = next(iter(theta.values()))
        prompts = self.measured.to(first.device).expand(len(first), -1)
        answers = self.answers.to(first.device)[prompts][:, :, None]
        return self.logps(theta, prompts, answers).sum(dim=-1).exp().mean(dim=(1, 2))
