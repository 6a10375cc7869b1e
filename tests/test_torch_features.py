"""gxpo.py with what torch offers beside optimizers: kinds of parameters, schedulers, averages, compiler, autocast."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from step_by_hand import (
    HORIZON,
    LIMIT,
    batches,
    by_hand,
    close,
    close_states,
    mlp,
    network,
    same,
    step,
    values,
    with_biases,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import gxpo
from gxpo import GXPO, Gate

# --------------------------------------------------------------------------------------------- parameters of every sort


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


# ------------------------------------------------------------------------------------------------- beside the optimizer

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),  # cycles beta1 as well
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=4),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's, to torch 2.7
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


# --------------------------------------------------------------------------------------------------------- the compiler

COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not COMPILER, reason="no C++ compiler or no Python.h")),
]
by_the_compiler = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning",
    "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",  # torch 2.6's, of its own cache
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",  # torch's, of that Python alone
)


@pytest.fixture(autouse=True)
def subnormals() -> Iterator[None]:
    """Code compiled by torch 2.4's inductor switches them off in the whole process, where hypothesis wants them."""
    yield
    torch.set_flush_denormal(False)


@contextmanager
def no_recompiling() -> Iterator[None]:
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


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


# ------------------------------------------------------------------------------------------------------------- autocast


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
