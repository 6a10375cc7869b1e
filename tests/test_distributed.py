"""gxpo.py on several ranks: real DDP and FSDP2, on gloo, against the same training in one process.

What a rank sees of the data, and which part of a tensor it holds, must not show in anything: not in the parameters, not
in which steps were active, not in what happens when something goes wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gxpo import GXPO, Gate

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]
Settings = dict[str, Any]
SAMPLES = 12  # of a batch; 2, 3 and 4 divide it
GATE = Gate(window=5, threshold=1.2, patience=1, cooldown=3)  # opens and closes a few times in 40 steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------- the training


def network(hidden: int = 5) -> nn.Sequential:
    """Sizes that neither 2 nor 3 divide, and a last layer of which most ranks have nothing."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's share. Features of all sizes, so that coordinates lie on both sides of the activity rule's bound."""
    rng = torch.Generator().manual_seed(step)
    x, y = (torch.randn(SAMPLES, n, generator=rng, dtype=torch.float64) for n in (7, 1))
    x = x * torch.logspace(0, -5, 7, dtype=torch.float64)
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    return x[mine], y[mine]


def wrapped(kind: str, world: int, hidden: int = 5) -> nn.Module:
    net = network(hidden)
    if kind == "ddp":
        return DistributedDataParallel(net)
    if "tp" in kind:  # the first layer's rows and the last one's columns are split; a bias in between is whole
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(net, mesh=mesh["dp"]) if kind == "fsdp + tp" else net
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        return net
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def optimizer(model: nn.Module, **settings: Any) -> GXPO:
    base = settings.pop("base", torch.optim.AdamW)
    return GXPO(base(model.parameters(), lr=0.02), **{"max_grad_norm": 0.5, "gate": GATE, **settings})


def step(model: nn.Module, opt: GXPO, number: int, rank: int = 0, world: int = 1) -> None:
    x, y = batch(number, rank, world)

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    opt.step(closure)


def whole(model: nn.Module) -> list[Tensor]:
    """Every parameter, all of it."""
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def seen(opt: GXPO) -> tuple[str, dict[str, float]]:
    return opt.report.outcome, opt.report.metrics("")


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


@pytest.mark.parametrize(
    ("kind", "world", "settings"),
    [
        pytest.param(kind, world, SETTINGS[name], id=f"{kind} on {world}, {name}")
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


# ------------------------------------------------------------------------------------------------- what goes wrong


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
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
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


# --------------------------------------------------------------------------------------------- who trains with whom


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
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, target: (y - target).square().mean())
    opt, before = optimizer(module), whole(module)
    try:
        for _ in opt.passes():
            schedule.step(*([torch.ones(8, 4)] if rank == 0 else []), **({"target": torch.zeros(8, 4)} if rank else {}))
    except RuntimeError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, whole(module), strict=True))
    return "trained", False


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


def draws_anew(rank: int, world: int, kind: str, again: bool) -> str:
    model = wrapped(kind, world)
    opt = optimizer(model, check_same_batch=True)
    draws = iter(range(99))
    try:
        for _ in opt.passes():
            x, y = batch(next(draws) if again and rank == 1 else 0, rank, world)
            (model(x) - y).square().mean().backward()
    except RuntimeError as error:
        return str(error)
    return f"{opt.report.outcome}, {opt.report.passes} passes"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_same_batch_is_checked_on_all_ranks(ranks: Ranks, kind: str) -> None:
    assert ranks.run(draws_anew, 2, kind, False) == ["active, 4 passes"] * 2
    for said in ranks.run(draws_anew, 2, kind, True):
        assert said.startswith("check_same_batch: two gradients at theta0 differ")


def differs_in_one_shard(rank: int, world: int) -> str:
    model = wrapped("fsdp", world)
    opt = optimizer(model, check_same_batch=True)
    x, y = batch(0, rank, world)
    try:
        for turn, _ in enumerate(opt.passes()):
            (model(x) - y).square().mean().backward()
            if turn == 1 and rank == 1:
                for p in model.parameters():
                    p.grad.to_local().mul_(1.3)
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_the_same_batch_is_checked_over_all_shards(ranks: Ranks) -> None:
    """A rank that judged by its own shard alone would stop while the others go on."""
    for said in ranks.run(differs_in_one_shard, 2):
        assert said.startswith("check_same_batch: two gradients at theta0 differ")


def caught_in_a_pass(rank: int, world: int, at: int, whole_time: bool) -> list[float]:
    model = network()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=not whole_time)
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


@pytest.mark.parametrize("whole_time", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_caught_exception_resharding_shows_theta0(ranks: Ranks, at: int, whole_time: bool) -> None:
    """What abort()'s docstring tells users of FSDP2, whose gathered weights would be those of the dropped point."""
    for before, after in ranks.run(caught_in_a_pass, 2, at, whole_time):
        assert before == after


def counts(rank: int, world: int, kind: str) -> list[int]:
    """all_reduce calls of gxpo.py in each pass of a step; the wrapper's own are made elsewhere."""
    model = wrapped(kind, world)
    opt = optimizer(model)
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


@pytest.mark.parametrize(("kind", "each"), [("ddp", [2, 4, 6]), ("fsdp", [3, 6, 10])])
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


# ------------------------------------------------------------------------------------------------------ checkpoints


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
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
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


def test_a_state_dict_of_shards_is_a_copy(ranks: Ranks) -> None:
    assert ranks.run(state_dicts, 2) == [True, True]


# ----------------------------------------------------------------------------------------------------------- refused


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
