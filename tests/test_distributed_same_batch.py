"""If these fail, check_same_batch lets a rank with another batch pass, or stops one rank while the others go on."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import Ranks
from training_on_ranks import DDP_AND_FSDP2, batch, needs_fsdp2, needs_gloo, optimizer, step, whole, wrapped

from gxpo_reference.same_batch import check_same_batch

pytestmark = needs_gloo


def checked(rank: int, world: int, kind: str, again: bool) -> tuple[str, bool]:
    """What the check says where rank 1 alone draws a new batch for each pass (`again`), and whether the parameters and
    the training that follows are as without it."""
    model, unchecked = wrapped(kind, world), wrapped(kind, world)
    step(model, opt := optimizer(model), 0, rank, world)
    step(unchecked, other := optimizer(unchecked), 0, rank, world)
    draws = itertools.count()

    def closure() -> None:
        x, y = batch(next(draws) if again and rank == 1 else 0, rank, world)
        (model(x) - y).square().mean().backward()

    try:
        said = f"{check_same_batch(model, closure):g}"
    except RuntimeError as error:
        said = str(error)
    step(model, opt, 1, rank, world)
    step(unchecked, other, 1, rank, world)
    return said, all(map(torch.equal, whole(model), whole(unchecked)))


@pytest.mark.parametrize("kind", DDP_AND_FSDP2)
def test_a_batch_that_changes_on_one_rank_is_found_on_all(ranks: Ranks, kind: str) -> None:
    assert ranks.run(checked, 2, kind, False) == [("0", True)] * 2
    (said, unmoved), other = ranks.run(checked, 2, kind, True)
    assert said.startswith("two gradients at the same parameters differ by")
    assert unmoved
    assert other == (said, unmoved)


def differs_in_one_shard(rank: int, world: int) -> str:
    model = wrapped("fsdp", world)
    x, y = batch(0, rank, world)
    calls = itertools.count()

    def closure() -> None:
        (model(x) - y).square().mean().backward()
        if next(calls) == 1 and rank == 1:
            for p in model.parameters():
                p.grad.to_local().mul_(1.3)

    with pytest.raises(RuntimeError) as caught:
        check_same_batch(model, closure)
    return str(caught.value)


@needs_fsdp2
def test_all_shards_are_compared_together(ranks: Ranks) -> None:
    """A rank that judged by its own shard alone would stop while the others go on."""
    said, other = ranks.run(differs_in_one_shard, 2)
    assert said.startswith("two gradients at the same parameters differ by")
    assert other == said
