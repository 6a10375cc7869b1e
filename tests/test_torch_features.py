"""gxpo.py with what torch offers beside it: its optimizers, compiler, autocast, schedulers, averages and devices.

The reference is `by_hand`: a second instance of the torch optimizer does the real steps, numpy the formulas.
"""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import gxpo
from gxpo import GXPO, Gate

Loss = Callable[[list[Tensor], Tensor], Tensor]
Options = dict[str, Any]

HORIZON, ALPHA, LIMIT = 5, 0.5, 2.0


# ---------------------------------------------------------------------------------------------------- the reference


def clipped(params: list[Tensor], limit: float | None) -> tuple[list[np.ndarray | None], float]:
    """The gradients as the optimizer will see them, and their norm before clipping."""
    grads = [None if p.grad is None else p.grad.double().cpu().numpy().copy() for p in params]
    norm = float(np.sqrt(sum((g**2).sum() for g in grads if g is not None)))
    c = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    for p in params:
        if p.grad is not None:
            p.grad *= c
    return [None if g is None else c * g for g in grads], norm


def by_hand(
    params: list[Tensor],
    base: torch.optim.Optimizer,
    loss: Loss,
    x: Tensor,
    policy: str = "keep",
    limit: float | None = LIMIT,
) -> tuple[list[Tensor], torch.optim.Optimizer, list[float], float]:
    """One active step from its formulas: new parameters and optimizer (the given ones are used up), norms, mean q."""
    theta0 = [p.detach().double().cpu().numpy().copy() for p in params]
    fast, fast_base = copy.deepcopy((params, base))
    pairs, norms = [], []
    for _ in range(2):
        fast_base.zero_grad()
        loss(fast, x).backward()
        g, norm = clipped(fast, limit)
        pairs.append(g)
        norms.append(norm)
        fast_base.step()

    ends, scales = [], []
    for p, origin, before, after in zip(fast, theta0, *pairs, strict=True):
        if before is None or after is None:
            q = np.ones_like(origin)
        else:
            active = np.abs(before) > 1e-3 * np.sqrt(np.mean(before**2))
            r = np.clip(np.where(active, after / np.where(active, before, 1.0), 0.0), -2.0, 3.0)
            q = np.clip(sum(r**n for n in range(HORIZON)) / (1.0 + r), 1.0, HORIZON / 2 + 1)
        ends.append(torch.from_numpy(np.asarray(origin + ALPHA * q * (p.detach().double().cpu().numpy() - origin))))
        if before is not None:
            scales.append(q.ravel())

    if policy == "keep":
        params, base = fast, fast_base
    with torch.no_grad():
        for p, end in zip(params, ends, strict=True):
            p.copy_(end)
    base.zero_grad()
    loss(params, x).backward()
    norms.append(clipped(params, limit)[1])
    base.step()
    return params, base, norms, float(np.concatenate(scales).mean())


# ---------------------------------------------------------------------------------------------------- the problems


def matrices(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [0.4 * torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 8), (8, 3))]
    return [p.to(device, dtype).requires_grad_() for p in made]


def with_biases(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    biases = [torch.full((n,), 0.1, device=device, dtype=dtype, requires_grad=True) for n in (8, 3)]
    return matrices(device, dtype) + biases


def mlp(params: list[Tensor], x: Tensor) -> Tensor:
    """Two layers, biases or not. Steps of the sizes below change its gradient, so that r is not 1."""
    first, second, *biases = params
    hidden = x @ first + (biases[0] if biases else 0.0)
    return 3.0 * (hidden.tanh() @ second + (biases[1] if biases else 0.0) - x[:, :3].sin()).square().mean()


def batches(n: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 6, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(n)]


def step(opt: GXPO, params: list[Tensor], x: Tensor, loss: Loss = mlp) -> None:
    def closure() -> Tensor:
        value = loss(params, x)
        value.backward()
        return value

    opt.step(closure)


def values(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=tolerance, atol=tolerance)


def close_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for one, other in zip(a.state.values(), b.state.values(), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, Tensor):
                close([value], [other[key]], 1e-10 if value.dtype == torch.float64 else 1e-6)
            else:
                assert value == other[key], key


# -------------------------------------------------------------------------------------- every optimizer of torch.optim

BASES: dict[str, tuple[str, Options]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "SGD nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "SGD maximize": ("SGD", {"lr": 0.01, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.05, "weight_decay": 0.01}),
    "Adam amsgrad": ("Adam", {"lr": 0.05, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW maximize": ("AdamW", {"lr": 0.01, "maximize": True}),
    "AdamW amsgrad": ("AdamW", {"lr": 0.05, "amsgrad": True}),
    "AdamW tensor lr": ("AdamW", {"lr": torch.tensor(0.05, dtype=torch.float64)}),
    "AdamW explicit": ("AdamW", {"lr": 0.05, "differentiable": False, "foreach": False, "fused": False}),
    "Adamax": ("Adamax", {"lr": 0.05}),
    "NAdam": ("NAdam", {"lr": 0.05, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": ("RAdam", {"lr": 0.05}),
    "Adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    "Adadelta": ("Adadelta", {"lr": 1.0}),
    "ASGD": ("ASGD", {"lr": 0.1, "t0": 3}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": ("Rprop", {"lr": 0.01}),
    "Adafactor": ("Adafactor", {"lr": 0.05}),
    "Muon": ("Muon", {"lr": 0.05}),
}


def built(name: str, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    kind, given = BASES[name]
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    return getattr(torch.optim, kind)(params, **{**copy.deepcopy(given), **options})


def start(name: str) -> list[Tensor]:
    return matrices() if name == "Muon" else with_biases()  # Muon takes matrices only


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("name", BASES)
def test_every_torch_optimizer_takes_the_step_of_the_formulas(name: str, policy: str) -> None:
    """If not, "any torch optimizer" would be true of some: state not put back, a gradient changed in place, a count
    that runs ahead."""
    ours, theirs = start(name), start(name)
    opt = GXPO(built(name, ours), horizon=HORIZON, alpha=ALPHA, optimizer_state=policy, max_grad_norm=LIMIT, gate=None)
    base = built(name, theirs)
    for x in batches(5):
        step(opt, ours, x)
        theirs, base, norms, mean_q = by_hand(theirs, base, mlp, x, policy)
        assert opt.report.outcome == "active"
        close(ours, theirs)
        close_states(opt.base, base)
        assert opt.report.grad_norms == pytest.approx(norms, rel=1e-10)
        assert opt.report.mean_q == pytest.approx(mean_q, rel=1e-10)


def test_the_table_has_every_optimizer() -> None:
    """A newer torch may bring one that nobody has tried; the three left out are refused (below, test_failures.py)."""
    kinds = {n for n, k in vars(torch.optim).items() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)}
    assert kinds - {"Optimizer", "LBFGS", "SparseAdam"} <= {kind for kind, _ in BASES.values()}


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_each_group_keeps_its_rate_and_weight_decay(policy: str) -> None:
    """If not, heads with a larger rate, or norms without weight decay, would be trained like the rest."""
    runs = []
    for _ in range(2):
        params = with_biases()
        groups = [{"params": params[:1], "lr": 0.1, "weight_decay": 0.3}, {"params": params[1:], "betas": (0.5, 0.9)}]
        runs.append((params, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)))
    (ours, wrapped), (theirs, base) = runs
    opt = GXPO(wrapped, optimizer_state=policy, max_grad_norm=LIMIT)
    for x in batches(4):
        step(opt, ours, x)
        theirs, base, _, _ = by_hand(theirs, base, mlp, x, policy)
        close(ours, theirs)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.01]


def test_a_rate_that_is_a_tensor_changes_nothing() -> None:
    """It lives in the groups, where rollback copies: one replaced by its copy would detach a scheduler or a graph."""
    ours, theirs = with_biases(), with_biases()
    rate = torch.tensor(0.05, dtype=torch.float64)
    opt = GXPO(torch.optim.AdamW(ours, lr=rate))
    twin = GXPO(torch.optim.AdamW(theirs, lr=0.05))
    for n, x in enumerate(batches(4)):
        step(opt, ours, x)
        step(twin, theirs, x)
        rate.mul_(0.5)
        twin.param_groups[0]["lr"] = 0.05 * 0.5 ** (n + 1)
    assert opt.param_groups[0]["lr"] is rate
    close(ours, theirs)


VARIANTS = [(n, "foreach") for n in BASES if n not in ("Muon", "AdamW tensor lr", "AdamW explicit")]
VARIANTS += [(n, "fused") for n in ("SGD", "SGD momentum", "SGD nesterov", "Adam", "Adam amsgrad", "AdamW", "Adagrad")]


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize(("name", "how"), VARIANTS)
def test_foreach_and_fused_are_the_for_loop(name: str, how: str, policy: str, device: str) -> None:
    """If not, the faster implementation would train something else: it keeps its state elsewhere."""
    ours, theirs = with_biases(device), with_biases(device)
    opt = GXPO(built(name, ours, **{how: True}), optimizer_state=policy, max_grad_norm=LIMIT)
    twin = GXPO(built(name, theirs, foreach=False), optimizer_state=policy, max_grad_norm=LIMIT)
    for x in batches(4, device):
        step(opt, ours, x)
        step(twin, theirs, x)
        close(ours, theirs, 1e-6 if name in ("ASGD", "NAdam") else 1e-11)  # torch has float32 scalars in these
    assert opt.report.outcome == "active"


def test_sparse_adam_is_refused_for_either_kind_of_gradient() -> None:
    """A sparse gradient has no coordinate of its own to compare; a dense one SparseAdam itself refuses, in mid-step."""
    for sparse, error, message in ((True, TypeError, "dense real gradients only"), (False, RuntimeError, "SparseAdam")):
        table = nn.Embedding(5, 2, sparse=sparse)
        opt = GXPO(torch.optim.SparseAdam(table.parameters(), lr=0.1))
        before = values([table.weight])
        with pytest.raises(error, match=message):
            opt.step(lambda table=table: (loss := table(torch.tensor([1, 2])).sum(), loss.backward())[0])
        assert same([table.weight], before)
        assert not opt.state


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    """GXPO steps from .grad; LBFGS would run the closure on its own, at points that GXPO knows nothing of."""
    with pytest.raises(TypeError, match="steps without a closure, got <class 'torch.optim.lbfgs.LBFGS'>"):
        GXPO(torch.optim.LBFGS(with_biases()))


# ----------------------------------------------------------------------------------------- parameters of every sort


class TiedModel(nn.Module):
    """An embedding that is the head as well, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.copy_(torch.linspace(-1, 1, 28, dtype=torch.float64).sin().reshape(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh())


def test_tied_parameters_count_once() -> None:
    """Twice in the norm, the clip or mean q, or moved twice, and every language model with tied weights is wrong."""
    net = TiedModel()
    words, targets = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 2, 3, 0, 6])
    opt = GXPO(torch.optim.AdamW(net.parameters(), lr=0.1), max_grad_norm=0.5)

    def used_twice(params: list[Tensor], words: Tensor) -> Tensor:
        return nn.functional.cross_entropy(params[0][words].tanh() @ params[0].T, targets)

    theirs = [net.embed.weight.detach().clone().requires_grad_()]
    base: torch.optim.Optimizer = torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(3):
        for _ in opt.passes():
            nn.functional.cross_entropy(net(words), targets).backward()
        theirs, base, norms, mean_q = by_hand(theirs, base, used_twice, words, limit=0.5)
        assert opt.report.grad_norms == pytest.approx(norms, rel=1e-10)
        assert opt.report.mean_q == pytest.approx(mean_q, rel=1e-10)
        close([net.embed.weight], theirs)
    assert net.head.weight is net.embed.weight


def test_frozen_parameters_are_as_if_they_were_not_there() -> None:
    """LoRA hands the whole model to the optimizer: frozen weights must not move, decay, or count in norm and mean q."""
    ours, theirs = with_biases(), with_biases()
    ours[0].requires_grad_(False)
    opt = GXPO(torch.optim.AdamW(ours, lr=0.1, weight_decay=0.5), max_grad_norm=1.0)
    twin = GXPO(torch.optim.AdamW(theirs[1:], lr=0.1, weight_decay=0.5), max_grad_norm=1.0)
    theirs[0].requires_grad_(False)
    for x in batches(3):
        step(opt, ours, x)
        step(twin, theirs, x)
        assert opt.report == twin.report
    assert same(ours, theirs)
    assert torch.equal(ours[0], with_biases()[0])


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_layers_frozen_and_unfrozen_between_steps(policy: str) -> None:
    """Gradual unfreezing: a layer that sat out must come back to its own moments, and not move while it sits out."""
    ours, theirs = with_biases(), with_biases()
    opt = GXPO(torch.optim.AdamW(ours, lr=0.05), optimizer_state=policy, max_grad_norm=LIMIT)
    base: torch.optim.Optimizer = torch.optim.AdamW(theirs, lr=0.05)
    for trained, x in zip([(1, 3), (0, 1, 2, 3), (0,), (1, 2, 3), (0, 1, 2, 3)], batches(5), strict=True):
        for params in (ours, theirs):
            for n, p in enumerate(params):
                p.requires_grad_(n in trained)
        before = values(ours)
        step(opt, ours, x)
        theirs, base, norms, mean_q = by_hand(theirs, base, mlp, x, policy)
        close(ours, theirs)
        assert opt.report.grad_norms == pytest.approx(norms, rel=1e-10)
        assert opt.report.mean_q == pytest.approx(mean_q, rel=1e-10)
        assert [torch.equal(p, q) for p, q in zip(ours, before, strict=True)] == [n not in trained for n in range(4)]


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_two_micro_batches_are_the_whole_batch(form: str) -> None:
    """If not, accumulation would take its fast steps on half a batch, or six gradients for three."""
    ours, theirs = with_biases(), with_biases()
    opt = GXPO(torch.optim.AdamW(ours, lr=0.05), max_grad_norm=LIMIT, gate=Gate(window=3, threshold=1.0, patience=1))
    twin = GXPO(torch.optim.AdamW(theirs, lr=0.05), max_grad_norm=LIMIT, gate=Gate(window=3, threshold=1.0, patience=1))

    def closure(x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for half in x.chunk(2):
            loss = mlp(ours, half) / 2
            loss.backward()
            total += loss.detach()
        return total

    for n, x in enumerate(batches(6)):
        x = x * (3.0 if n == 4 else 1.0)  # this one closes the gate
        if form == "closure":
            opt.step(lambda x=x: closure(x))
        else:
            for _ in opt.passes():
                opt.observe(loss=closure(x))
        step(twin, theirs, x)
        close(ours, theirs)
        assert (opt.report.outcome, opt.report.passes) == (twin.report.outcome, twin.report.passes)
        assert opt.report.loss == pytest.approx(twin.report.loss, rel=1e-12)
        assert opt.report.grad_norms == pytest.approx(twin.report.grad_norms, rel=1e-10)
    assert (opt.report.outcome, opt.report.fallback_step) == ("single", 4)


# ------------------------------------------------------------------------------------------------ beside the optimizer

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),  # cycles beta1 as well
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=4),
}


@pytest.mark.parametrize("form", ["closure", "passes"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_advance_once_a_step(name: str, form: str) -> None:
    """Once a pass and training ends at a third; and all three steps of an outer step have to see the same rate."""
    params, other = with_biases(), with_biases()
    plain = torch.optim.AdamW(other, lr=0.05)
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](plain)
    seen: list[tuple[float, Any]] = []
    opt.base.register_step_pre_hook(lambda o, *_: seen.append((o.param_groups[0]["lr"], o.param_groups[0]["betas"])))
    for n, x in enumerate(batches(8)):
        seen.clear()
        if form == "closure":
            step(opt, params, x)
        else:
            for _ in opt.passes():
                mlp(params, x).backward()
        plain.step()  # no gradients: only so that its scheduler has a step to follow
        assert seen == [(plain.param_groups[0]["lr"], plain.param_groups[0]["betas"])] * 3, n
        metric = (1.0,) if name == "ReduceLROnPlateau" else ()
        ours.step(*metric), theirs.step(*metric)
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert ours.last_epoch == theirs.last_epoch
    assert plain.param_groups[0]["lr"] != 0.05


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_an_average_of_the_weights_sees_the_end_of_each_step(form: str) -> None:
    """An EMA fed by the base's steps would average theta1 and the virtual point, where nobody stays."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    opt = GXPO(torch.optim.AdamW(net.parameters(), lr=0.05))
    ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75))
    swa = swa_utils.AveragedModel(net)
    opt.register_step_post_hook(lambda *_: (ema.update_parameters(net), swa.update_parameters(net)))
    ends: list[list[Tensor]] = []
    for x in batches(4):

        def closure(x: Tensor = x) -> Tensor:
            loss = (net(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        if form == "closure":
            opt.step(closure)
        else:
            for _ in opt.passes():
                closure()
        ends.append(values(list(net.parameters())))
    by_formula = ends[0]
    for end in ends[1:]:
        by_formula = [0.75 * a + 0.25 * p for a, p in zip(by_formula, end, strict=True)]
    close(list(ema.module.parameters()), by_formula)
    close(list(swa.module.parameters()), [torch.stack(each).mean(0) for each in zip(*ends, strict=True)])
    assert (int(ema.n_averaged), int(swa.n_averaged)) == (4, 4)


# ------------------------------------------------------------------------------------------------------ the compiler

COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not COMPILER, reason="no C++ compiler or no Python.h")),
]
by_the_compiler = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@contextmanager
def no_recompiling() -> Iterator[None]:
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


@by_the_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_takes_the_same_steps(backend: str) -> None:
    """If weights were baked in or guarded, passes would not see the move, or each would compile the model again."""
    torch._dynamo.reset()
    plain, compiled = network(), network()
    fast = torch.compile(compiled, backend=backend)
    gate = Gate(max_active_steps=3)
    opts = [GXPO(torch.optim.AdamW(m.parameters(), lr=0.05), max_grad_norm=LIMIT, gate=gate) for m in (plain, compiled)]
    for n, x in enumerate(batches(5)):
        with no_recompiling() if n else nullcontext():
            for run, opt in zip((plain, fast), opts, strict=True):
                for _ in opt.passes():
                    (run(x) - x[:, :3].sin()).square().mean().backward()
        close(list(plain.parameters()), list(compiled.parameters()))
        assert opts[1].report.outcome == opts[0].report.outcome == ("active" if n < 3 else "single")


@by_the_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_dropout_is_replayed(backend: str) -> None:
    """The compiler draws its own random numbers; with a rate of 0 only other masks could change the gradient."""
    torch._dynamo.reset()
    net = network(dropout=0.5)
    fast, x = torch.compile(net, backend=backend), batches(1)[0]
    norms = []
    for replay in (True, False):
        opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.0), replay_rng=replay)
        for _ in opt.passes():
            fast(x).square().mean().backward()
        norms.append(opt.report.grad_norms)
    assert norms[0] == pytest.approx([norms[0][0]] * 3, rel=1e-12)
    assert len(set(norms[1])) == 3


@by_the_compiler
@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_a_compiled_optimizer_step(policy: str) -> None:
    """torch.compile(optimizer.step) must not hold on to state tensors that rollback and "restore" write."""
    torch._dynamo.reset()
    ours, theirs = with_biases(), with_biases()
    base = torch.optim.SGD(ours, lr=0.05, momentum=0.9)
    base.step = torch.compile(base.step, backend="aot_eager")
    opt = GXPO(base, optimizer_state=policy)
    twin = GXPO(torch.optim.SGD(theirs, lr=0.05, momentum=0.9), optimizer_state=policy)
    for x in batches(4):
        step(opt, ours, x)
        step(twin, theirs, x)
        close(ours, theirs)
    close_states(opt.base, twin.base)


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("form", ["closure", "passes", "lookahead"])
@pytest.mark.parametrize("around", ["forward", "pass", "step"])
def test_under_autocast_every_gradient_is_that_of_its_own_point(around: str, form: str, device: str) -> None:
    """Autocast casts a float32 weight once a block. One block around all passes would hand pass 2 the bfloat16 copy of
    theta0: g1 = g0, r = 1 everywhere, and a constant multiplier that looks like training."""

    def autocast(where: str) -> Any:
        return torch.autocast(device, dtype=torch.bfloat16) if where == around else nullcontext()

    def run(params: list[Tensor], x: Tensor) -> Tensor:
        with autocast("pass"):
            with autocast("forward"):
                value = mlp(params, x)
            value.backward()
        return value

    params = with_biases(device, torch.float32)
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def closure(x: Tensor) -> Tensor:
        at = values(params)
        value = run(params, x)
        seen.append((at, [p.grad.clone() for p in params]))
        return value

    for x in batches(2, device, torch.float32):
        seen.clear()
        with autocast("step"):
            if form == "closure":
                opt.step(lambda x=x: closure(x))
            elif form == "passes":
                for _ in opt.passes():
                    closure(x)
            else:
                opt.zero_grad()
                closure(x)
                while opt.lookahead():
                    closure(x)
                opt.step()
        assert [g.dtype for g in seen[0][1]] == [torch.float32] * 4
        for at, got in seen:
            fresh = [p.requires_grad_() for p in at]
            with autocast("step"):
                run(fresh, x)
            assert same(got, [p.grad for p in fresh])
        assert opt.report.outcome == "active"
        assert opt.report.mean_q != HORIZON / 2


def test_under_autocast_a_step_that_starts_over_starts_from_its_own_weights() -> None:
    """Whoever empties autocast's cache between passes has to do so on the way back to theta0 as well."""
    params, x = with_biases(dtype=torch.float32), batches(1, dtype=torch.float32)[0]
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    gradients: list[list[Tensor]] = []

    def closure() -> Tensor:
        value = mlp(params, x)
        value.backward()
        gradients.append([p.grad.clone() for p in params])
        return value * (float("nan") if len(gradients) == 2 else 1.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(closure)
    assert (opt.report.outcome, opt.report.passes) == ("rolled back", 3)
    assert same(gradients[2], gradients[0])


# ------------------------------------------------------------------------------------------------------- schedule-free


def schedule_free(params: list[Tensor], **options: Any) -> Any:
    package = pytest.importorskip("schedulefree", reason="the package schedulefree is not installed")
    base = package.AdamWScheduleFree(params, lr=0.05, weight_decay=0.1, warmup_steps=4, r=1.0, **options)
    base.train()
    return base


def snapshot(base: torch.optim.Optimizer, params: list[Tensor]) -> str:
    """Everything that a failed step has to put back, to the last bit."""

    def plain(entries: Any) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in entries.items() if k != "params"}

    return repr((plain(dict(enumerate(params))), [plain(d) for d in (*base.state.values(), *base.param_groups)]))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_schedule_free_takes_the_step_of_the_formulas(policy: str, foreach: bool) -> None:
    """It divides .grad in place, counts in its groups, and its parameters are y: any of these could spoil r or s0."""
    ours, theirs = with_biases(), with_biases()
    opt = GXPO(schedule_free(ours, foreach=foreach), optimizer_state=policy, max_grad_norm=LIMIT)
    base = schedule_free(theirs, foreach=foreach)
    for n, x in enumerate(batches(6)):
        step(opt, ours, x)
        theirs, base, norms, mean_q = by_hand(theirs, base, mlp, x, policy)
        close(ours, theirs)
        close_states(opt.base, base)
        assert opt.report.grad_norms == pytest.approx(norms, rel=1e-10)
        assert opt.report.mean_q == pytest.approx(mean_q, rel=1e-10)
        for key in ("k", "weight_sum", "lr_max", "scheduled_lr"):
            assert opt.param_groups[0][key] == base.param_groups[0][key], key
        assert opt.param_groups[0]["k"] == (n + 1) * (3 if policy == "keep" else 1)
        if n == 2:  # evaluate at x in between: y again afterwards
            for either in (opt, base):
                either.eval()
            close(ours, theirs)
            for either in (opt, base):
                either.train()


@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("after", [0, 2])
def test_a_failed_step_leaves_no_trace_in_schedule_free(after: int, at: int, policy: str) -> None:
    """z, the second moments, and k, weight_sum, lr_max in the groups, bit for bit; the y iterate as well."""
    params = with_biases()
    opt = GXPO(schedule_free(params), optimizer_state=policy)
    for x in batches(after):
        step(opt, params, x)
    before = snapshot(opt.base, params)
    calls = []

    def fails(params: list[Tensor], x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == at:
            raise MemoryError
        return mlp(params, x)

    with pytest.raises(MemoryError):
        step(opt, params, batches(1)[0], fails)
    assert snapshot(opt.base, params) == before


def test_schedule_free_that_is_not_in_train_mode_says_so_and_loses_nothing() -> None:
    """Its own check fires in the first fast step; nobody then must be left at theta1."""
    params = with_biases()
    opt = GXPO(schedule_free(params))
    step(opt, params, batches(1)[0])
    opt.eval()
    before = snapshot(opt.base, params)
    with pytest.raises(Exception, match="not in train mode"):
        step(opt, params, batches(1)[0])
    assert snapshot(opt.base, params) == before


# ------------------------------------------------------------------------------------------------- what users get wrong


def refused(opt: GXPO, params: list[Tensor], closure: Callable[[], Any], message: str) -> None:
    """The error, nothing lost, and a good step afterwards."""
    before = snapshot(opt.base, params), opt.gate_state
    with pytest.raises(RuntimeError, match=message):
        opt.step(closure)
    assert (snapshot(opt.base, params), opt.gate_state) == before
    step(opt, params, batches(1)[0])
    assert opt.report.outcome == "active"


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_a_late_pass_without_gradients(policy: str, at: int) -> None:
    """A loss cached from pass 1, or a batch that is used up: a step from no gradient would count as one."""
    params = with_biases()
    opt = GXPO(torch.optim.AdamW(params, lr=0.05), optimizer_state=policy)
    step(opt, params, batches(1)[0])
    calls: list[int] = []

    def closure() -> float:
        calls.append(0)
        if len(calls) < at:
            mlp(params, batches(1)[0]).backward()
        return 1.0

    refused(opt, params, closure, "no parameter has a gradient: was backward")


@pytest.mark.parametrize("how", ["step()", "step(closure)", "passes()"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_inside_the_closure(at: int, how: str) -> None:
    """optimizer.step() left in the closure by habit would take a step of its own at every pass."""
    params = with_biases()
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    step(opt, params, batches(1)[0])
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(0)
        loss = mlp(params, batches(1)[0])
        loss.backward()
        if len(calls) == at:
            {"step()": opt.step, "step(closure)": lambda: opt.step(closure), "passes()": lambda: next(opt.passes())}[
                how
            ]()
        return loss

    refused(opt, params, closure, "needs a closure" if how == "step()" else "another step in the middle of a step")


def test_gxpo_around_gxpo_and_a_step_of_another_inside_the_closure() -> None:
    """The first would take nine gradients for one step; the second is bilevel training, and must not mix the two."""
    params, inner = with_biases(), [torch.ones(3, dtype=torch.float64, requires_grad=True)]
    opt = GXPO(torch.optim.AdamW(params, lr=0.05))
    with pytest.raises(TypeError, match="got <class 'gxpo.GXPO'>"):
        GXPO(opt)
    alone = with_biases()
    twin = GXPO(torch.optim.AdamW(alone, lr=0.05))
    other = GXPO(torch.optim.SGD(inner, lr=0.1))
    for x in batches(3):

        def with_another(params: list[Tensor], x: Tensor) -> Tensor:
            step(other, inner, x, lambda own, _: (own[0] ** 2).sum())
            return mlp(params, x)

        step(opt, params, x, with_another)
        step(twin, alone, x)
        assert opt.report == twin.report
    assert same(params, alone)
    assert other.gate_state.step == 9


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_in_the_closure_is_harmless(set_to_none: bool) -> None:
    """Every closure written for LBFGS has one. Zeroing in place must not write to the gradients that GXPO keeps."""
    ours, theirs = with_biases(), with_biases()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = GXPO(torch.optim.AdamW([*ours, unused], lr=0.05), gate=Gate("disagreement"))
    twin = GXPO(torch.optim.AdamW(theirs, lr=0.05), gate=Gate("disagreement"))
    for x in batches(3):

        def zeroed(params: list[Tensor], x: Tensor) -> Tensor:
            opt.zero_grad(set_to_none=set_to_none)
            return mlp(params, x)

        step(opt, ours, x, zeroed)
        step(twin, theirs, x)
        assert opt.report == twin.report
    assert same(ours, theirs)
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------- CUDA

ON_CUDA: list[Options] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}]


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [{}, {"estimator": "displacement", "optimizer_state": "restore"}])
@pytest.mark.parametrize("options", ON_CUDA)
def test_cuda_is_the_cpu(options: Options, settings: dict[str, Any]) -> None:
    """If not, what was tested on a CPU says nothing about where people train."""
    here, there = with_biases(), with_biases("cuda")
    gate = Gate(window=5, threshold=2.0, patience=1, cooldown=3)
    opt = GXPO(torch.optim.AdamW(here, lr=0.01), max_grad_norm=LIMIT, gate=gate, **settings)
    twin = GXPO(torch.optim.AdamW(there, lr=0.01, **options), max_grad_norm=LIMIT, gate=gate, **settings)
    for n, x in enumerate(batches(20)):
        x = x * (4.0 if n == 9 else 1.0)
        step(opt, here, x)
        step(twin, there, x.cuda())
        assert (opt.report.outcome, opt.report.passes) == (twin.report.outcome, twin.report.passes)
        close(there, here, 1e-10)
    assert opt.gate_state.fallback_step is not None


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(
    "settings", [{}, {"estimator": "displacement", "optimizer_state": "restore"}, {"gate": Gate("disagreement")}]
)
@pytest.mark.parametrize("options", ON_CUDA)
def test_only_the_reading_of_the_figures_waits_for_the_gpu(
    options: Options, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait stalls the GPU; one a pass, in `_read`, is what deciding takes. Anywhere else torch raises here."""
    params = with_biases("cuda")
    opt = GXPO(torch.optim.AdamW(params, lr=0.01, **options), max_grad_norm=0.1, **settings)
    x, read, waits = batches(1, "cuda")[0], GXPO._read, []
    step(opt, params, x)  # allocations and lazy initialisation

    def reading(self: GXPO, *arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return read(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("error")
            waits.append(len(caught))

    monkeypatch.setattr(GXPO, "_read", reading)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(opt, params, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1, 1, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("policy", gxpo.STATE_POLICIES)
def test_parameters_on_two_devices(policy: str) -> None:
    """An embedding left on the CPU: norms, clip and rollback have to reach both; nothing may be moved."""
    here, split = with_biases(), with_biases()
    split[0] = split[0].detach().cuda().requires_grad_()

    def loss(params: list[Tensor], x: Tensor) -> Tensor:
        return mlp([p.cpu() for p in params], x)

    opt = GXPO(torch.optim.AdamW(here, lr=0.05), optimizer_state=policy, max_grad_norm=LIMIT)
    twin = GXPO(torch.optim.AdamW(split, lr=0.05), optimizer_state=policy, max_grad_norm=LIMIT)
    for x in batches(5):
        step(opt, here, x)
        step(twin, split, x, loss)
        close(split, here, 1e-10)
        assert twin.report.grad_norms == pytest.approx(opt.report.grad_norms, rel=1e-10)
    assert [p.device.type for p in split] == ["cuda", "cpu", "cpu", "cpu"]


@pytest.mark.cuda
def test_dropout_masks_on_cuda_agree_in_all_passes() -> None:
    """The GPU has a generator of its own. With a rate of 0 only other masks could change the gradient."""
    net, x = network(dropout=0.5).cuda(), batches(1, "cuda")[0]
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.0))
    for _ in opt.passes():
        net(x).square().mean().backward()
    assert opt.report.grad_norms == pytest.approx([opt.report.grad_norms[0]] * 3, rel=1e-12)
