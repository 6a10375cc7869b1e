"""If these fail, ranks train together that should not, or in an arrangement in which GXPO's figures would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from training_on_ranks import batch, needs_gloo, network, optimizer, step, whole

from gxpo import GXPO, Gate

pytestmark = needs_gloo


# ------------------------------------------------------------------------------------------------- who trains with whom


def not_averaged(rank: int, world: int, apart: bool) -> Any:
    model = network()
    group, _ = dist.new_subgroups(group_size=1) if apart else (None, None)
    opt = optimizer(model, process_group=group)
    try:
        for number in range(3):
            step(model, opt, number, rank, world)
    except RuntimeError as error:
        return str(error)
    return whole(model)


def test_gradients_that_are_not_everybodys_are_refused(ranks: Ranks) -> None:
    """A forgotten DDP wrapper trains as many models as there are ranks, and no curve shows it."""
    for said in ranks.run(not_averaged, 2, False):
        assert "the norm of the gradient differs between ranks" in said


def pipelined(rank: int, world: int) -> tuple[str, bool]:
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    example = {"input_args": torch.ones(4, 4)} if torch.__version__ < (2, 8) else {}  # the first ones need it
    stage = PipelineStage(module, rank, world, torch.device("cpu"), **example)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, target: (y - target).square().mean())
    opt, before = optimizer(module), whole(module)
    try:
        for _ in opt.passes():
            schedule.step(*([torch.ones(8, 4)] if rank == 0 else []), **({"target": torch.zeros(8, 4)} if rank else {}))
    except RuntimeError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, whole(module), strict=True))
    return "trained", False


@pytest.mark.skipif(
    (2, 9) <= torch.__version__ < (2, 10), reason="torch 2.9's pipelines send 8 bytes to who waits for 4, over gloo"
)
def test_a_pipeline_is_refused(ranks: Ranks) -> None:
    """Each stage would clip by the norm of its own layers, and one might close its gate while the others wait."""
    for said, untouched in ranks.run(pipelined, 2):
        assert "not a pipeline's stages" in said
        assert untouched


def test_ranks_with_a_group_each_train_apart(ranks: Ranks) -> None:
    """A population, say; the others' norms are nobody's business."""
    first, second = ranks.run(not_averaged, 2, True)
    assert not torch.equal(first[0], second[0])


def two_pairs(rank: int, world: int) -> tuple[float, list[Tensor]]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, inside = groups[rank // 2], rank % 2
    model = DistributedDataParallel(network(), process_group=mine)
    opt = optimizer(model, process_group=mine, gate=Gate("supplied", window=2))
    for number in range(3):
        x, y = batch(number + 10 * (rank // 2), inside, 2)
        for _ in opt.passes():
            loss = (1.0 + rank // 2) * (model(x) - y).square().mean()
            opt.observe(loss=loss, statistic=float(rank))
            loss.backward()
    return opt.report.statistic, whole(model)


def test_groups_of_several_ranks_train_apart(ranks: Ranks) -> None:
    """Two pairs: what a pair reads is the pair's, by its own numbers within the group."""
    answers = ranks.run(two_pairs, 4)
    assert [statistic for statistic, _ in answers] == [0.5, 0.5, 2.5, 2.5]
    (a, b), (c, d) = ([params[0] for _, params in pair] for pair in (answers[:2], answers[2:]))
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert not torch.equal(a, c)


# -------------------------------------------------------------------------------------------------------------- refused


def fsdp1(rank: int, world: int, original: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
    try:
        optimizer(model)
    except TypeError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(ranks: Ranks, original: bool) -> None:
    """Its flat shards cross tensors: activity and the tensor estimator would be wrong without a sign."""
    for said in ranks.run(fsdp1, 2, original):
        assert "use fully_shard (FSDP2)" in said


def zero_redundancy(rank: int, world: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    base: Callable[..., Any] = ZeroRedundancyOptimizer
    with pytest.raises(TypeError) as caught:
        GXPO(base(network().parameters(), torch.optim.AdamW, lr=0.1))
    return str(caught.value)


def test_zero_redundancy_is_refused(ranks: Ranks) -> None:
    """A rank could put back only its own share of the state."""
    assert all("use FSDP2 or DDP" in said for said in ranks.run(zero_redundancy, 2))


def test_deepspeed_is_refused() -> None:
    """Its engine owns backward, clipping and step. DeepSpeed itself is not installed here: its marks are."""
    engine = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(TypeError, match="use FSDP2 or DDP"):
        GXPO(engine([torch.ones(1, requires_grad=True)], lr=0.1))
    partitioned = torch.ones(1, requires_grad=True)
    partitioned.ds_id = 0  # what ZeRO-3 marks parameters with
    with pytest.raises(TypeError, match="DeepSpeed's engine, which gathers and steps them by itself: use FSDP2 or DDP"):
        GXPO(torch.optim.SGD([partitioned], lr=0.1))
