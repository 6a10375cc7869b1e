"""The three forms of a step, what it costs, and what it is equal to."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gxpo
from gxpo import GXPO, Gate


def model(device: str = "cpu", dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return layers.to(device, dtype)


def batches(n: int, net: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    p = next(net.parameters())
    return [torch.randn(16, 6, generator=generator, dtype=torch.float64).to(p) for _ in range(n)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x[:, :3].sin()).square().mean()


def by_closure(opt: GXPO, net: nn.Module, x: Tensor, scale: float) -> None:
    def closure() -> Tensor:
        loss = scale * loss_of(net, x)
        loss.backward()
        return loss

    opt.step(closure)


def by_passes(opt: GXPO, net: nn.Module, x: Tensor, scale: float) -> None:
    for _ in opt.passes():
        (scale * loss_of(net, x)).backward()


def by_lookahead(opt: GXPO, net: nn.Module, x: Tensor, scale: float) -> None:
    """As a trainer does it: its own zero_grad, backward, clip and step."""
    opt.zero_grad()
    (scale * loss_of(net, x)).backward()
    while opt.lookahead():
        (scale * loss_of(net, x)).backward()
    if opt.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), opt.max_grad_norm)
    opt.step()


FORMS = {"closure": by_closure, "passes": by_passes, "lookahead": by_lookahead}
Form = Callable[[GXPO, nn.Module, Tensor, float], None]


def train(form: Form, steps: int = 12, device: str = "cpu", **settings: Any) -> tuple[nn.Module, list[gxpo.Report]]:
    net = model(device)
    opt = GXPO(torch.optim.AdamW(net.parameters(), lr=1e-2), **settings)
    reports = []
    for n, x in enumerate(batches(steps, net)):
        form(opt, net, x, 30.0 if n == 8 else 1.0)
        reports.append(opt.report)
    return net, reports


@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.5}, {"optimizer_state": "restore"}, {"estimator": "tensor"}]
)
def test_the_three_forms_are_one_step(settings: dict[str, Any], device: str) -> None:
    """If not, a trainer that owns its last step would train something else than a script does."""
    settings = {"gate": Gate(window=4, patience=1), **settings}
    runs = {name: train(form, device=device, **settings) for name, form in FORMS.items()}
    reference, reports = runs["closure"]
    assert [r.outcome for r in reports] == ["active"] * 9 + ["single"] * 3
    assert [r.passes for r in reports] == [3] * 9 + [1] * 3
    for net, others in runs.values():
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)  # the trainer clips by its own rounding
        assert [r.outcome for r in others] == [r.outcome for r in reports]


def plain(net: nn.Module, base: torch.optim.Optimizer, xs: list[Tensor], limit: float | None) -> None:
    for x in xs:
        base.zero_grad()
        loss_of(net, x).backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(net.parameters(), limit)
        base.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_closed_from_the_start_it_is_the_base_optimizer_bit_for_bit(form: str, base: type, device: str) -> None:
    """If not, fallback would not be what people trained with before."""
    ours, theirs = model(device), model(device)
    opt = GXPO(base(ours.parameters(), lr=1e-2), gate=Gate("never", max_active_steps=0))
    for x in batches(6, ours):
        FORMS[form](opt, ours, x, 1.0)
    plain(theirs, base(theirs.parameters(), lr=1e-2), batches(6, theirs), None)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_lookahead_leaves_the_last_gradient_unclipped() -> None:
    """If it clipped, a trainer's own clip would act twice and its logged norm would be wrong."""
    net = model()
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.1), max_grad_norm=1e-3)
    x = batches(1, net)[0]
    loss_of(net, x).backward()
    while opt.lookahead():
        loss_of(net, x).backward()
    assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm() > 0.01
    opt.step()


def test_dropout_masks_agree_in_all_passes() -> None:
    """If not, g1 differs from g0 by noise, and r with it. With lr = 0 nothing else can differ: r = 1, q = K/2."""
    net = model(dropout=0.5)
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.0), horizon=5)
    for form in (by_closure, by_passes):
        form(opt, net, batches(1, net)[0], 1.0)
        active = torch.cat([p.grad.flatten() != 0 for p in net.parameters()])
        assert opt.report.grad_norms == pytest.approx([opt.report.grad_norms[0]] * 3, rel=1e-12)
        assert opt.report.mean_q == pytest.approx(1 + 1.5 * active.double().mean().item(), rel=1e-6)
    opt.replay_rng = False
    by_closure(opt, net, batches(1, net)[0], 1.0)
    assert len(set(opt.report.grad_norms)) == 3


def test_randomness_after_a_step_is_as_after_one_pass() -> None:
    """If not, switching GXPO on would change what is sampled next."""
    states = []
    for gate in (None, Gate("never", max_active_steps=0)):
        net = model(dropout=0.5)
        opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.1), gate=gate)
        torch.manual_seed(0)
        by_closure(opt, net, batches(1, net)[0], 1.0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    """If not, frozen layers or unused experts would move, or a layer used in one pass only would be lost."""
    used, frozen, unused = (torch.ones(3, dtype=torch.float64, requires_grad=n != 1) for n in range(3))
    late = torch.ones(3, dtype=torch.float64, requires_grad=True)  # has a gradient in the second pass only
    opt = GXPO(torch.optim.SGD([used, frozen, unused, late], lr=0.1, weight_decay=0.1), alpha=0.5)
    for n in opt.passes():
        (used * used).sum().backward()
        if n == 1:
            late.grad = torch.ones(3, dtype=torch.float64)
    assert torch.equal(frozen, torch.ones(3, dtype=torch.float64))
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
    assert not torch.equal(used, torch.ones(3, dtype=torch.float64))
    # One fast step with gradient 1 + 0.1 and no ratio: q = 1, half of it remains.
    torch.testing.assert_close(late.detach(), torch.full((3,), 1 - 0.5 * 0.1 * 1.1, dtype=torch.float64))


def test_mixed_dtypes_and_shapes_in_one_optimizer(device: str) -> None:
    """If not, models with a float32 head on a bfloat16 body could not be trained."""
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    shapes = [(), (0,), (3,), (2, 5)]
    params = [torch.full(s, 0.5, dtype=k, device=device, requires_grad=True) for k in kinds for s in shapes]
    strided = torch.full((4, 6), 0.5, device=device).t().requires_grad_()
    opt = GXPO(torch.optim.AdamW([*params, strided], lr=0.01), max_grad_norm=1.0)
    for _ in range(2):
        by_params = [*params, strided]
        for _ in opt.passes():
            sum((p.float() ** 2).sum() for p in by_params).backward()
    assert opt.report.outcome == "active"
    for p in (*params, strided):
        assert p.isfinite().all()
        assert (p < 0.5).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are worked through in blocks of rows; one skipped or doubled would fail large models only."""
    torch.manual_seed(0)
    target = torch.randn(700, 300, dtype=torch.float64)  # 210,000 numbers: four blocks
    ends = []
    for in_blocks in (True, False):
        if not in_blocks:
            monkeypatch.setattr(gxpo, "_block_size", lambda _: 10**9)
        for estimator in gxpo.ESTIMATORS:
            theta = torch.zeros_like(target).requires_grad_()
            opt = GXPO(torch.optim.SGD([theta], lr=0.3), estimator=estimator)
            for _ in opt.passes():
                torch.cosh(theta - target).sum().backward()
            ends.append((theta.detach(), opt.report.mean_q))
    for (end, mean_q), (whole, whole_mean_q) in zip(ends[:3], ends[3:], strict=True):
        torch.testing.assert_close(end, whole, rtol=1e-14, atol=1e-14)
        assert mean_q == pytest.approx(whole_mean_q, rel=1e-12)


def count(shape: tuple[int, ...]) -> int:
    """How many times a parameter's size of memory tensors hold, those of the tests before this one included."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.numel() >= math.prod(shape)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return round(sum(held.values()) / (4 * math.prod(shape)))


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"rollback": False}, 2),  # theta0, and g0 which becomes q
        ({"rollback": False, "estimator": "displacement"}, 2),
        ({"rollback": True}, 4),  # AdamW's two moments as well
        ({"rollback": False, "optimizer_state": "restore"}, 4),
        ({"rollback": False, "gate": Gate("disagreement")}, 3),
    ],
)
def test_memory_is_two_buffers_and_the_state_copy(settings: dict[str, Any], extra: int) -> None:
    """If not, a model that just fits would run out of memory."""
    shape, seen = (170, 130), []
    theta = torch.ones(shape, requires_grad=True)
    opt = GXPO(torch.optim.AdamW([theta], lr=0.1), **settings)
    by_hand = torch.full(shape, 0.5)
    for step in range(2):
        for _ in opt.passes():
            theta.grad = by_hand.clone()
            if step == 1:  # the optimizer's state exists by now
                seen.append(count(shape))
    after = count(shape)
    assert max(seen) - seen[0] == extra
    assert after == seen[0]  # nothing stays


def test_report_says_what_happened() -> None:
    """If it did not, nobody could tell from a log whether GXPO did anything."""
    _, reports = train(by_closure, gate=Gate(window=4, patience=1), horizon=5, alpha=0.5)
    tripped, single = reports[8], reports[9]
    assert (tripped.outcome, tripped.active, tripped.fallback_step, tripped.streak) == ("active", True, 8, 1)
    assert (reports[7].why, tripped.why) == ("", "the gate closes")
    assert tripped.z is not None
    assert tripped.z >= 3
    assert tripped.multiplier == pytest.approx(1 + tripped.mean_q)
    assert (single.outcome, single.passes, single.why, single.mean_q) == ("single", 1, "gate closed at step 8", None)
    metrics = tripped.metrics()
    assert all(isinstance(v, float) for v in metrics.values())
    assert metrics["gxpo/active"] == 1.0
    assert metrics["gxpo/grad_norm_corrective"] == tripped.grad_norms[2]
    assert reports[0].metrics().keys() & {"gxpo/z", "gxpo/fallback_step"} == set()  # not measured: absent, not zero
    assert "gxpo/mean_q" not in single.metrics("gxpo/")
    assert single.metrics("train/")["train/passes"] == 1.0


def test_passes_report_no_loss_unless_told() -> None:
    """observe(loss=...) is how a loop without a closure gets its loss checked and reported."""
    net = model()
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.1))
    x = batches(1, net)[0]
    by_passes(opt, net, x, 1.0)
    assert opt.report.loss is None
    first = loss_of(net, x).item()
    for _ in opt.passes():
        loss = loss_of(net, x)
        opt.observe(loss=loss)
        loss.backward()
    assert opt.report.loss == pytest.approx(first, rel=1e-12)


def test_the_closure_is_given_gradients_even_under_no_grad() -> None:
    net = model()
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.1))
    with torch.no_grad():
        by_closure(opt, net, batches(1, net)[0], 1.0)
    assert opt.report.outcome == "active"


def test_the_loss_returned_is_the_first() -> None:
    net = model()
    opt = GXPO(torch.optim.SGD(net.parameters(), lr=0.1))
    x, losses = batches(1, net)[0], []

    def closure() -> Tensor:
        losses.append(loss_of(net, x))
        losses[-1].backward()
        return losses[-1]

    assert opt.step(closure) is losses[0]
    assert opt.report.loss == losses[0].item()


def test_a_pasted_copy_checks_itself() -> None:
    run = subprocess.run([sys.executable, gxpo.__file__], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "5 of 5 checks passed" in run.stdout


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_one_host_sync_a_pass() -> None:
    """Every sync stalls the GPU; one a pass is what deciding takes."""
    net = model("cuda", torch.float32)
    opt = GXPO(torch.optim.AdamW(net.parameters(), lr=1e-2), max_grad_norm=1.0)
    x = batches(1, net)[0]
    by_passes(opt, net, x, 1.0)  # allocations and lazy initialisation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            by_passes(opt, net, x, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 3


@pytest.mark.parametrize("estimator", ["gradient", "displacement"])
def test_tensors_larger_than_a_block_are_treated_whole(estimator: str, device: str) -> None:
    """Large tensors are worked on in blocks of rows; a block left out, or an RMS of one block alone, would show where
    no small test looks. On a diagonal quadratic alpha = 1 makes a step K + 1 plain ones, 3 where |g0| is too small."""
    shapes = [(700, 301), (301, 700), (1, 200_003), (200_003,), (3, 5)]
    wide = {"dtype": torch.float64, "device": device}
    thetas = [torch.ones(shape, **wide).requires_grad_() for shape in shapes]
    thetas[1] = torch.ones(700, 301, **wide).T.detach().requires_grad_()  # other strides
    curvatures = [torch.linspace(1e-4, 1.0, p.numel(), **wide).view(p.shape) for p in thetas]
    opt = GXPO(torch.optim.SGD(thetas, lr=0.5), horizon=5, alpha=1.0, estimator=estimator)
    for _ in opt.passes():
        sum(0.5 * (c * p * p).sum() for c, p in zip(curvatures, thetas, strict=True)).backward()
    for c, p in zip(curvatures, thetas, strict=True):
        takes_part = c > 1e-3 * c.square().mean().sqrt()
        assert 0 < takes_part.sum() < c.numel() or c.numel() == 15
        want = torch.where(takes_part, (1 - 0.5 * c) ** 6, (1 - 0.5 * c) ** 3)
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-13)
    norm = sum(c.square().sum().item() for c in curvatures) ** 0.5
    assert opt.report.grad_norms[0] == pytest.approx(norm, rel=1e-12)
