"""If these fail, "any torch optimizer" is true of some only: torch.optim's under GXPO, and schedule-free AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from step_by_hand import (
    ALPHA,
    HORIZON,
    LIMIT,
    Options,
    batches,
    by_hand,
    close,
    close_states,
    matrices,
    mlp,
    same,
    snapshot,
    step,
    values,
    with_biases,
)
from torch import Tensor, nn

import gxpo
from gxpo import GXPO

# ---------------------------------------------------------------------------------------------------------- torch.optim

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
    """A newer torch may bring one that nobody has tried; LBFGS and SparseAdam are refused, below."""
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


# -------------------------------------------------------------------------------------------------------- schedule-free


def schedule_free(params: list[Tensor], **options: Any) -> Any:
    package = pytest.importorskip("schedulefree", reason="the package schedulefree is not installed")
    base = package.AdamWScheduleFree(params, lr=0.05, weight_decay=0.1, warmup_steps=4, r=1.0, **options)
    base.train()
    return base


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
