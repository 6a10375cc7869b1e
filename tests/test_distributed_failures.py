"""If these fail, what goes wrong on one rank leaves the ranks in different places, or some of them waiting for ever."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from training_on_ranks import (
    DDP_AND_FSDP2,
    batch,
    needs_fsdp2,
    needs_gloo,
    network,
    optimizer,
    seen,
    sharded,
    step,
    whole,
    wrapped,
)

pytestmark = needs_gloo


def one_bad_pass(rank: int, world: int, kind: str, bad: int, how: str) -> Any:
    """Rank 1 sees something non-finite in pass `bad` of the second step."""
    model = wrapped(kind, world)
    opt = optimizer(model)
    step(model, opt, 0, rank, world)
    x, y = batch(1, rank, world)
    before, calls = whole(model), iter(range(1, 9))

    def closure() -> Tensor | float:
        loss = (model(x) - y).square().mean()
        now = next(calls) == bad and rank == 1
        (loss * float("nan") if now and how == "gradient" else loss).backward()
        return float("inf") if now and how == "loss" else loss

    opt.step(closure)
    report = seen(opt)
    step(model, opt, 2, rank, world)
    return before, report, whole(model)


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize("kind", DDP_AND_FSDP2)
def test_what_one_rank_sees_go_wrong_all_ranks_undo(ranks: Ranks, kind: str, bad: int, how: str) -> None:
    """A rank that rolls back alone is in another place than the rest, for good. A loss can be infinite on one rank
    while every gradient is finite."""
    answers = ranks.run(one_bad_pass, 2, kind, bad, how)
    outcomes = [outcome for _, (outcome, _), _ in answers]
    assert outcomes == ["skipped" if bad == 1 else "rolled back"] * 2
    for mine, theirs in zip(answers[0][2], answers[1][2], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()


def dies(rank: int, world: int, kind: str, folder: str) -> None:
    model = wrapped(kind, world)
    opt = optimizer(model)
    step(model, opt, 0, rank, world)
    x, y = batch(1, rank, world)
    before = [(p.to_local() if kind == "fsdp" else p).detach().clone() for p in model.parameters()]
    calls = iter(range(1, 9))

    def closure() -> Tensor:
        if next(calls) == 2 and rank == 1:
            raise MemoryError
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    try:
        opt.step(closure)
    except Exception as error:
        after = [(p.to_local() if kind == "fsdp" else p).detach() for p in model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        (Path(folder) / f"{rank}").write_text(f"{type(error).__name__} {same}")
    os._exit(0)


@pytest.mark.parametrize("kind", DDP_AND_FSDP2)
def test_an_exception_that_ends_one_rank_ends_the_step_on_all(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Nobody waits for the dead, and what a handler then saves are the parameters before the step."""
    assert ranks.run(dies, 2, kind, str(tmp_path)) == [None, None]
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert told[1] == "MemoryError True"
    assert told[0].endswith("Error True")


def goes_on(rank: int, world: int, kind: str) -> tuple[list[str], bool, list[Tensor]]:
    """Rank 1 catches an exception of pass 2 and takes the next batch as if nothing had been."""
    model = wrapped(kind, world)
    opt = optimizer(model)
    step(model, opt, 0, rank, world)
    before, said, calls = whole(model), [], iter(range(1, 9))
    number = 1
    for _ in range(2 if rank == 1 else 1):
        x, y = batch(number, rank, world)
        number += 1

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            if next(calls) == 2 and rank == 1:
                raise MemoryError("too long a batch")
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        try:
            opt.step(closure)
        except (MemoryError, RuntimeError) as error:
            said.append(str(error))
    back = all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
    for number in range(5, 8):
        step(model, opt, number, rank, world)
    return said, back, whole(model)


@pytest.mark.parametrize("kind", DDP_AND_FSDP2)
def test_a_rank_that_went_on_alone_is_found_out(ranks: Ranks, kind: str) -> None:
    """It would be in pass 1 of one step while the others are in pass 2 of another, and their gradients would mix."""
    answers = ranks.run(goes_on, 2, kind)
    for rank, (said, back, _) in enumerate(answers):
        assert len(said) == rank + 1
        assert "the ranks are not in the same pass of the same step" in said[-1]
        assert back
    assert all(torch.equal(a, b) for a, b in zip(answers[0][2], answers[1][2], strict=True))


def changes_its_rate(rank: int, world: int) -> str:
    model = wrapped("ddp", world)
    opt = optimizer(model)
    x, y = batch(0, rank, world)

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        if rank == 1:
            opt.param_groups[0]["lr"] *= 0.9
        return loss

    with pytest.raises(RuntimeError) as caught:
        opt.step(closure)
    return str(caught.value)


def test_an_error_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(changes_its_rate, 2)
    assert "rank 1 cannot use its gradient" in first
    assert "a learning rate or the set of parameters changed" in second


def one_is_sparse(rank: int, world: int) -> str:
    model = nn.Embedding(6, 2, sparse=rank == 1)
    opt = optimizer(model, base=torch.optim.SGD)
    model(torch.tensor([1, 2])).sum().backward()
    try:
        opt.lookahead()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_gradient_of_a_wrong_kind_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    """Or the others would wait for it in a collective."""
    first, second = ranks.run(one_is_sparse, 2)
    assert first.startswith("RuntimeError: rank 1 cannot use its gradient")
    assert second.startswith("TypeError: GXPO takes dense real gradients only")


def caught_in_a_pass(rank: int, world: int, at: int, whole_time: bool) -> list[float]:
    from torch.distributed.fsdp import FSDPModule  # before torch 2.6 it is not there

    model = network()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        sharded(layer, mesh=mesh, reshard_after_forward=not whole_time)
    opt = optimizer(model)
    x, y = batch(0, rank, world)
    calls = iter(range(1, 9))

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        if next(calls) == at:
            raise MemoryError
        loss.backward()
        return loss

    def loss() -> float:
        with torch.no_grad():
            return (model(x) - y).square().mean().item()

    before = loss()
    with contextlib.suppress(MemoryError):
        opt.step(closure)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [before, loss()]


@needs_fsdp2
@pytest.mark.parametrize("whole_time", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_caught_exception_resharding_shows_theta0(ranks: Ranks, at: int, whole_time: bool) -> None:
    """What abort()'s docstring tells users of FSDP2, whose gathered weights would be those of the dropped point."""
    for before, after in ranks.run(caught_in_a_pass, 2, at, whole_time):
        assert before == after
