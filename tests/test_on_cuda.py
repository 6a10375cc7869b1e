"""If these fail, GXPO on a GPU is not what it is on a CPU, or makes the GPU wait more often than it must."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from step_by_hand import LIMIT, Options, batches, close, mlp, network, step, with_biases
from torch import Tensor

import gxpo
from gxpo import GXPO, Gate

ON_CUDA: list[Options] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}]


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [{}, {"estimator": "displacement", "optimizer_state": "restore"}])
@pytest.mark.parametrize("options", ON_CUDA)
def test_cuda_is_the_cpu(options: Options, settings: dict[str, Any]) -> None:
    """If not, what was tested on a CPU says nothing about where people train."""
    here, there = with_biases(), with_biases("cuda")
    gate = Gate(window=5, threshold=2.0, patience=1, cooldown=3)
    tolerance = 1e-5 if options.get("capturable") else 1e-10  # there torch corrects the bias by float32 counts of steps
    opt = GXPO(torch.optim.AdamW(here, lr=0.01), max_grad_norm=LIMIT, gate=gate, **settings)
    twin = GXPO(torch.optim.AdamW(there, lr=0.01, **options), max_grad_norm=LIMIT, gate=gate, **settings)
    for n, x in enumerate(batches(20)):
        x = x * (4.0 if n == 9 else 1.0)
        step(opt, here, x)
        step(twin, there, x.cuda())
        assert (opt.report.outcome, opt.report.passes) == (twin.report.outcome, twin.report.passes)
        close(there, here, tolerance)
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
