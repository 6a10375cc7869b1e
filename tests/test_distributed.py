"""gxpo.py on several ranks: real DDP and FSDP2, on gloo, against the same training in one process.

What a rank sees of the data, and which part of a tensor it holds, must not show in anything: not in the parameters, not
in which steps were active, not in what is reported, saved and loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from training_on_ranks import (
    DDP_AND_FSDP2,
    Settings,
    batch,
    needs_fsdp2,
    needs_fsdp2_with_tp,
    needs_gloo,
    needs_hsdp,
    network,
    optimizer,
    seen,
    step,
    whole,
    wrapped,
)

from gxpo import Gate

pytestmark = needs_gloo


def train(
    rank: int, world: int, kind: str, settings: Settings, steps: int = 40, hidden: int = 5
) -> tuple[list[Tensor], list[Any]]:
    model = wrapped(kind, world, hidden)
    opt = optimizer(model, **settings)
    reports = []
    if "tp" in kind:  # ranks that share every tensor see the same data
        rank, world = rank // 2, world // 2
    for number in range(steps):
        step(model, opt, number, rank, world)
        reports.append(seen(opt))
    return whole(model), reports


def alone(settings: Settings, steps: int = 40, hidden: int = 5) -> tuple[list[Tensor], list[Any]]:
    """The same in this process, on all the data."""
    return train(0, 1, "", settings, steps, hidden)


SETTINGS: dict[str, Settings] = {
    "as it comes": {},
    "displacement, restore": {"estimator": "displacement", "optimizer_state": "restore"},
    "tensor, disagreement": {"estimator": "tensor", "gate": Gate("disagreement", window=5, threshold=1.0, patience=1)},
    "SGD": {"base": torch.optim.SGD, "horizon": 4, "rollback": False},
}
FEW, MANY = ["as it comes", "tensor, disagreement"], list(SETTINGS)
PLACES = {
    ("ddp", 2): MANY,
    ("ddp", 3): FEW,
    ("fsdp", 2): MANY,
    ("fsdp", 3): MANY,
    ("hsdp", 4): FEW,
    ("tp", 2): FEW,
    ("fsdp + tp", 4): FEW,
}
NEEDS = {"fsdp": needs_fsdp2, "hsdp": needs_hsdp, "fsdp + tp": needs_fsdp2_with_tp}


@pytest.mark.parametrize(
    ("kind", "world", "settings"),
    [
        pytest.param(kind, world, SETTINGS[name], id=f"{kind} on {world}, {name}", marks=NEEDS.get(kind, ()))
        for (kind, world), names in PLACES.items()
        for name in names
    ],
)
def test_ranks_train_as_one_process_does(ranks: Ranks, kind: str, world: int, settings: Settings) -> None:
    """Norms over a shard, or over replicas twice, would clip, extrapolate and fall back otherwise."""
    hidden = 6 if "tp" in kind else 5  # torch's tensor parallelism wants it even
    parameters, reports = alone(settings, hidden=hidden)
    outcomes = [outcome for outcome, _ in reports]
    assert {"active", "single"} <= set(outcomes) or "base" in settings  # or the gate is not shown to agree
    for there, told in ranks.run(train, world, kind, settings, 40, hidden):
        assert [outcome for outcome, _ in told] == outcomes
        for (_, mine), (_, theirs) in zip(reports, told, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6)
        for mine, theirs in zip(parameters, there, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------- what is reported, and what it costs


def one_tells(rank: int, world: int) -> float | None:
    model = wrapped("ddp", world)
    opt = optimizer(model)
    x, y = batch(0)
    for _ in opt.passes():
        loss = (model(x) - y).square().mean()
        loss.backward()
        if rank == 0:
            opt.observe(loss=loss)
    return opt.report.loss


def test_a_loss_that_one_rank_knows_is_everybodys(ranks: Ranks) -> None:
    """The last stage of a loss, or the rank that logs. The mean is over those that told it."""
    x, y = batch(0)
    assert ranks.run(one_tells, 2) == pytest.approx([(network()(x) - y).square().mean().item()] * 2)


def without_second_gradients(rank: int, world: int, kind: str) -> float | None:
    model = wrapped(kind, world)
    opt = optimizer(model)
    x, y = batch(0, rank, world)
    for turn in opt.passes():
        (model(x) - y).square().mean().backward()
        if turn == 1:
            for p in list(model.parameters())[:2]:
                p.grad = None
    return opt.report.mean_q


@needs_fsdp2
def test_mean_q_counts_whole_tensors_on_every_rank(ranks: Ranks) -> None:
    """Those without a second gradient count as one, all of them and once, however they are sharded."""
    expected = without_second_gradients(0, 1, "")
    assert ranks.run(without_second_gradients, 2, "fsdp") == pytest.approx([expected] * 2)


def supplies(rank: int, world: int) -> list[float]:
    model = wrapped("ddp", world)
    opt = optimizer(model, gate=Gate("supplied", window=2))
    x, y = batch(0, rank, world)
    for _ in opt.passes():
        loss = (model(x) - y).square().mean()
        opt.observe(loss=loss, statistic=1.0 + rank)
        loss.backward()
    return [opt.report.statistic, opt.report.loss]


def test_figures_handed_in_are_averaged(ranks: Ranks) -> None:
    """Each rank measures the entropy of its own samples; gates that read those would part."""
    answers = ranks.run(supplies, 2)
    assert answers[0] == answers[1]
    assert answers[0] == pytest.approx([1.5, (network()(batch(0)[0]) - batch(0)[1]).square().mean().item()])


def counts(rank: int, world: int, kind: str) -> list[int]:
    """all_reduce calls of gxpo.py in each pass of a step; the wrapper's own are made elsewhere."""
    model = wrapped(kind, world)
    opt = optimizer(model)
    step(model, opt, 0, rank, world)  # the first active step asks the ranks once more, what the base steps from
    x, y = batch(0, rank, world)
    made, real = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: (made.append(1), real(*a, **k))[1]
    each = []
    try:
        (model(x) - y).square().mean().backward()
        while opt.lookahead():
            each.append(len(made))
            (model(x) - y).square().mean().backward()
        each.append(len(made))
    finally:
        dist.all_reduce = real
    return each


@pytest.mark.parametrize(("kind", "each"), [("ddp", [2, 4, 6]), pytest.param("fsdp", [3, 7, 10], marks=needs_fsdp2)])
def test_collectives_are_few(ranks: Ranks, kind: str, each: list[int]) -> None:
    """A collective for every tensor would cost a large model more than it computes."""
    assert ranks.run(counts, 2, kind) == [each, each]


def test_one_process_makes_no_distributed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's first users could not run it on one device."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.distributed was called")

    for name in ("all_reduce", "get_world_size", "get_rank", "barrier"):
        monkeypatch.setattr(dist, name, never)
    alone({}, 3)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def saves(rank: int, world: int, kind: str, folder: str) -> list[Tensor]:
    model = wrapped(kind, world)
    opt = optimizer(model)
    for number in range(9):
        step(model, opt, number, rank, world)
    kept = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt.base),
        "gxpo": opt.state_dict()["gxpo"],
    }
    dcp.save(kept, checkpoint_id=folder)
    for number in range(9, 18):
        step(model, opt, number, rank, world)
    return whole(model)


def resumes(rank: int, world: int, kind: str, folder: str) -> tuple[list[Tensor], int]:
    model = wrapped(kind, world)
    for p in model.parameters():
        p.detach().zero_()
    opt = optimizer(model)
    kept = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt.base),
        "gxpo": opt.state_dict()["gxpo"],
    }
    dcp.load(kept, checkpoint_id=folder)
    set_model_state_dict(model, kept["model"])
    set_optimizer_state_dict(model, opt.base, kept["optimizer"])
    opt.load_state_dict({"gxpo": kept["gxpo"]})
    at = opt.gate_state.step
    for number in range(9, 18):
        step(model, opt, number, rank, world)
    return whole(model), at


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's own, of its checkpoints
@pytest.mark.parametrize("kind", DDP_AND_FSDP2)
def test_a_sharded_checkpoint_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Gate and all: a gate that forgets opens again after every crash."""
    there = ranks.run(saves, 2, kind, str(tmp_path))
    for (resumed, at), whole_run in zip(ranks.run(resumes, 2, kind, str(tmp_path)), there, strict=True):
        assert at == 9
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole_run, strict=True))


def state_dicts(rank: int, world: int) -> bool:
    """Through state_dict() itself, as a trainer on each rank would."""
    model = wrapped("fsdp", world)
    opt = optimizer(model)
    for number in range(4):
        step(model, opt, number, rank, world)
    kept, local = opt.state_dict(), [p.to_local().clone() for p in model.parameters()]
    step(model, opt, 4, rank, world)
    want = whole(model)
    for p, value in zip(model.parameters(), local, strict=True):
        p.to_local().detach().copy_(value)
    opt.load_state_dict(kept)
    step(model, opt, 4, rank, world)
    return all(torch.equal(a, b) for a, b in zip(want, whole(model), strict=True))


@needs_fsdp2
def test_a_state_dict_of_shards_is_a_copy(ranks: Ranks) -> None:
    assert ranks.run(state_dicts, 2) == [True, True]
