"""gxpo.py in a loop of Hugging Face accelerate's, on one CPU process. What a user writes is `train`, below.

`prepare` wraps the optimizer in one that has neither passes() nor observe(): keep the GXPO that was handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gxpo import GXPO, Gate, Report

accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")

Run = tuple[list[list[Tensor]], list[Report], list[float]]  # after each step: parameters, report, learning rate

SETTINGS = {"max_grad_norm": 1.0, "gate": Gate(window=3, threshold=2.0, patience=1, cooldown=2)}
LOUD = (4, 5)  # steps whose batch is so loud that the gate closes; it opens again


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate's state is one for the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Data(torch.utils.data.Dataset):
    """Micro-batches of four rows; those of the steps in LOUD are large."""

    def __init__(self, steps: int, micro_batches: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randn(steps, micro_batches * 4, 6, generator=generator)
        for n in LOUD:
            self.rows[n : n + 1] *= 12.0
        self.rows = self.rows.reshape(-1, 6)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Tensor:
        return self.rows[n]


def parts(steps: int = 10, micro_batches: int = 1) -> tuple[nn.Module, GXPO, Any, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = GXPO(torch.optim.AdamW(model.parameters(), lr=0.02), **SETTINGS)
    own = torch.Generator()  # a loader draws a seed as it begins: not from the random numbers that dropout goes on with
    loader = torch.utils.data.DataLoader(Data(steps, micro_batches), batch_size=4, generator=own)
    return model, optimizer, loader, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()


def train(
    accelerator: Any,
    model: nn.Module,
    optimizer: GXPO,
    loader: Any,
    scheduler: Any,
    after: Callable[[int], None] = lambda n: None,
) -> Iterator[None]:
    """The loop to paste, less the yield. `model`, `loader` and `scheduler` are prepared, `optimizer` is the GXPO."""
    micro_batches = []
    for batch in loader:
        micro_batches.append(batch)
        if len(micro_batches) == accelerator.gradient_accumulation_steps:
            for _ in optimizer.passes():
                for micro_batch in micro_batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(loss_fn(model, micro_batch))
            scheduler.step()
            micro_batches.clear()
            yield


def record(model: nn.Module, optimizer: GXPO, steps: Iterator[None]) -> Run:
    run: Run = ([], [], [])
    for _ in steps:
        run[0].append([p.detach().clone() for p in model.parameters()])
        run[1].append(optimizer.report)
        run[2].append(optimizer.param_groups[0]["lr"])
    return run


def with_accelerate(micro_batches: int = 1, steps: int = 10, **options: Any) -> Run:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches, **options)
    model, optimizer, loader, scheduler = parts(steps, micro_batches)
    model, _, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    return record(model, optimizer, train(accelerator, model, optimizer, loader, scheduler))


def without(micro_batches: int = 1, steps: int = 10, forward: Callable[..., Tensor] = loss_fn) -> Run:
    """The closure form, and nothing of accelerate's."""
    model, optimizer, loader, scheduler = parts(steps, micro_batches)
    batches = list(loader)

    def plain() -> Iterator[None]:
        for n in range(steps):

            def closure(n: int = n) -> Tensor:
                total = torch.zeros(())
                for batch in batches[n * micro_batches : (n + 1) * micro_batches]:
                    loss = forward(model, batch) / micro_batches
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(closure)
            scheduler.step()
            yield

    return record(model, optimizer, plain())


def same(a: Run, b: Run) -> None:
    """Bit for bit; a loop reports no loss."""
    assert len(a[0]) == len(b[0])
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    for one, other in zip(a[1], b[1], strict=True):
        assert {**vars(one), "loss": None} == {**vars(other), "loss": None}
    assert a[2] == b[2]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_passes_around_accumulate_are_the_closure_form(micro_batches: int) -> None:
    """If not, accelerate would count passes as micro-batches, scale a loss twice, or step the schedule by passes."""
    torch.manual_seed(0)
    plain = without(micro_batches)
    torch.manual_seed(0)
    ours = with_accelerate(micro_batches)
    same(ours, plain)
    outcomes = [r.outcome for r in ours[1]]
    assert outcomes[:7] == ["active"] * 5 + ["single"] * 2  # the gate closes at a loud batch and opens again
    assert "active" in outcomes[7:]
    assert ours[2] == pytest.approx([0.02 * 0.9**n for n in range(1, 11)], rel=1e-12)


def test_the_prepared_optimizer_is_a_wrapper_without_passes() -> None:
    """If it had one some day, the README's "keep the GXPO" could go; until then its state must be the same object."""
    accelerator = accelerate.Accelerator(cpu=True)
    _, optimizer, _, _ = parts()
    wrapped = accelerator.prepare(optimizer)
    assert wrapped.optimizer is optimizer
    assert not hasattr(wrapped, "passes")
    assert wrapped.param_groups is optimizer.param_groups
    assert wrapped.state is optimizer.state


def closures_through_the_prepared_optimizer(micro_batches: int) -> tuple[Run, list[int]]:
    """The parameters after each micro-batch, and how often its closure was called."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model, optimizer, loader, scheduler = parts(micro_batches=micro_batches)
    model, wrapped, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    called: list[int] = []

    def steps() -> Iterator[None]:
        for batch in loader:
            called.append(0)

            def closure(batch: Tensor = batch) -> Tensor:
                called[-1] += 1
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                return loss

            with accelerator.accumulate(model):
                assert wrapped.step(closure) is None  # report.loss has it
                scheduler.step()
            yield

    return record(model, optimizer, steps()), called


def test_a_closure_through_the_prepared_optimizer() -> None:
    """Fine without accumulation: one closure is one step."""
    torch.manual_seed(0)
    plain = without()
    torch.manual_seed(0)
    run, called = closures_through_the_prepared_optimizer(1)
    same(run, plain)
    assert called == [r.passes for r in plain[1]]
    assert [r.loss for r in run[1]] == [r.loss for r in plain[1]]


def test_a_closure_through_the_prepared_optimizer_sees_the_last_micro_batch_only() -> None:
    """Why the README has passes(): accelerate skips step() while it accumulates, and the closure with it. If this
    fails, accelerate has changed, and the warning can go."""
    _, called = closures_through_the_prepared_optimizer(2)
    assert called[::2] == [0] * 10
    assert all(called[1::2])


class Position:
    """Something of the user's own to save: how many batches are done."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


@pytest.mark.parametrize("at", [2, 5, 6, 8])  # before the gate closes, right after, in the cooldown, open again
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_save_state_and_load_state_resume_bit_for_bit(micro_batches: int, at: int, tmp_path: Path) -> None:
    """If not, a run that was preempted would re-arm its gate, forget its window, or draw other dropout masks."""

    def begin(loader_of: Callable[[Any, Any], Any]) -> tuple[Any, Position, Callable[[], Iterator[None]], Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
        model, optimizer, loader, scheduler = parts(10, micro_batches)
        model, _, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        position = Position()
        accelerator.register_for_checkpointing(position)

        def steps() -> Iterator[None]:
            rest = loader_of(accelerator, position)(loader)
            for _ in train(accelerator, model, optimizer, rest, scheduler):
                position.done += micro_batches
                yield

        return accelerator, position, steps, (model, optimizer)

    torch.manual_seed(0)
    accelerator, _, steps, made = begin(lambda *_: lambda loader: loader)

    def saving() -> Iterator[None]:
        for n, _ in enumerate(steps(), 1):
            if n == at:
                accelerator.save_state(str(tmp_path / "checkpoint"))
            yield

    whole = record(*made, saving())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()

    torch.manual_seed(99)
    accelerator, position, steps, made = begin(
        lambda accelerator, position: lambda loader: accelerator.skip_first_batches(loader, position.done)
    )
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert position.done == at * micro_batches
    assert made[1].gate_state.step == at
    rest = record(*made, steps())
    same(rest, tuple(each[at:] for each in whole))


def test_bfloat16_is_autocast_in_every_pass() -> None:
    """accelerate casts in the model's forward, a block a call, so every pass casts its own weights."""

    def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return (out.float() - x[:, :3].sin()).square().mean()

    torch.manual_seed(0)
    plain = without(2, forward=under_autocast)
    torch.manual_seed(0)
    ours = with_accelerate(2, mixed_precision="bf16")
    same(ours, plain)
    torch.manual_seed(0)
    exact = without(2)
    assert any(not torch.equal(p, q) for p, q in zip(ours[0][0], exact[0][0], strict=True))
    assert all(p.dtype == torch.float32 for p in ours[0][-1])


def test_float16_means_nothing_on_a_cpu() -> None:
    """accelerate makes no scaler there, and casts nothing."""
    torch.manual_seed(0)
    plain = without()
    torch.manual_seed(0)
    same(with_accelerate(mixed_precision="fp16"), plain)
    assert accelerate.Accelerator(cpu=True).scaler is None


def test_a_grad_scaler_of_accelerates_is_refused() -> None:
    """As made for float16 on a GPU: the fast steps would take scaled gradients."""
    accelerate.Accelerator(cpu=True)
    model, optimizer, loader, _ = parts()
    scaler = torch.amp.GradScaler("cpu")
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    x = next(iter(loader))

    def closure() -> Tensor:
        loss = loss_fn(model, x)
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match="cannot run under an enabled GradScaler"):
        wrapped.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def clipping_run(limit: float | None, in_the_loop: float | None) -> Run:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, scheduler = parts(12)
    optimizer.gate, optimizer.max_grad_norm = Gate("never"), limit
    model, _, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def steps() -> Iterator[None]:
        for batch in loader:
            for _ in optimizer.passes():
                accelerator.backward(10 * loss_fn(model, batch))
                if in_the_loop is not None:
                    accelerator.clip_grad_norm_(model.parameters(), in_the_loop)
            yield

    return record(model, optimizer, steps())


def test_clip_grad_norm_in_the_loop_hides_the_norms() -> None:
    """max_grad_norm takes the same steps and sees the norms as they were. Clipped before, they say nothing to the gate,
    and GXPO warns."""
    torch.manual_seed(0)
    ours = clipping_run(limit=0.5, in_the_loop=None)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="is it clipped in the closure"):
        theirs = clipping_run(limit=None, in_the_loop=0.5)
    for a, b in zip(ours[0], theirs[0], strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert min(r.grad_norms[0] for r in ours[1]) > 0.6
    assert max(max(r.grad_norms) for r in theirs[1]) < 0.5 + 1e-5


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")  # rightly so
@pytest.mark.parametrize("habit", ["step()", "step(closure)", "scheduler.step()"])
def test_what_is_left_in_the_loop_by_habit_says_so(habit: str) -> None:
    """Both lines are in every accelerate loop; here passes() steps by itself, and the schedule follows the step."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, scheduler = parts()
    model, wrapped, scheduler = accelerator.prepare(model, optimizer, scheduler)
    batch = next(iter(loader))
    before = [p.detach().clone() for p in model.parameters()]
    left: dict[str, Callable[[], Any]] = {
        "step()": wrapped.step,
        "step(closure)": lambda: wrapped.step(lambda: loss_fn(model, batch)),
        "scheduler.step()": scheduler.step,
    }

    def one_step() -> None:
        for _ in optimizer.passes():
            with accelerator.accumulate(model):
                wrapped.zero_grad()  # this one is harmless
                accelerator.backward(loss_fn(model, batch))
                left[habit]()

    with pytest.raises(RuntimeError, match="calls it by itself|in the middle of a step|changed between the passes"):
        one_step()
    optimizer.abort()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_prepared_optimizer_as_base_is_refused() -> None:
    """Put around what prepare() returns, GXPO would step a wrapper that skips steps by its own rules."""
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1))
    with pytest.raises(TypeError, match=r"only wraps an optimizer: give that one to GXPO, and GXPO to prepare\(\)"):
        GXPO(prepared)
