"""A model of sizes that ranks cannot share evenly, wrapped as DDP, FSDP2 and others do, and its training on a rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gxpo import GXPO, Gate

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
needs_fsdp2 = pytest.mark.skipif(torch.__version__ < (2, 7), reason="before 2.7 torch's FSDP2 runs on GPUs only")
needs_hsdp = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="up to 2.7 torch's FSDP2 with replicas waits for an event that only a GPU makes"
)
needs_fsdp2_with_tp = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="up to 2.9 torch's FSDP2 with tensor parallelism is wrong for uneven shards"
)
DDP_AND_FSDP2 = ["ddp", pytest.param("fsdp", marks=needs_fsdp2)]
Settings = dict[str, Any]
SAMPLES = 12  # of a batch; 2, 3 and 4 divide it
GATE = Gate(window=5, threshold=1.2, patience=1, cooldown=3)  # opens and closes a few times in 40 steps


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


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard  # before torch 2.6 it is not there

    return fully_shard(module, **options)


def wrapped(kind: str, world: int, hidden: int = 5) -> nn.Module:
    net = network(hidden)
    if kind == "ddp":
        return DistributedDataParallel(net)
    if "tp" in kind:  # the first layer's rows and the last one's columns are split; a bias in between is whole
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return sharded(net, mesh=mesh["dp"]) if kind == "fsdp + tp" else net
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        return net
    for layer in (net[0], net[2]):
        sharded(layer, mesh=mesh)
    return sharded(net, mesh=mesh)


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
