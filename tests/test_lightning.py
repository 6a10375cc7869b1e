"""gxpo.py under a Lightning Trainer, on one CPU process.

Automatic optimization hands its closure to the optimizer's step, so GXPO needs nothing but to be returned from
configure_optimizers. In manual optimization `self.optimizers().step(closure)` is the form that the Trainer counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gxpo import GXPO, Gate, Report

lightning = pytest.importorskip("lightning", reason="the package lightning is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # Lightning's, of torch's
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

SETTINGS = {"max_grad_norm": 1.0, "gate": Gate(window=3, threshold=2.0, patience=1, cooldown=2)}
LOUD = (4, 5)  # steps whose loss is so loud that the gate closes; it opens again
STEPS, AN_EPOCH = 10, 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning tells about devices and tips by logging."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    """Of one epoch."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(AN_EPOCH)]


def loss_fn(net: nn.Module, x: Tensor, step: int) -> Tensor:
    return (net(x) - x[:, :3].sin()).square().mean() * (12.0 if step in LOUD else 1.0)


class Automatic(lightning.LightningModule):
    """All that a user writes: training_step, called once a pass, and configure_optimizers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net, self.settings = network(), {**SETTINGS, **settings}
        self.calls = 0
        self.seen: list[tuple[list[Tensor], Report, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        return loss_fn(self.net, batch, self.trainer.global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = GXPO(torch.optim.AdamW(self.parameters(), lr=0.02), **self.settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        torch.manual_seed(self.trainer.global_step)  # so that a resumed run drops the same units

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        self.seen.append((values(self.net), optimizer.report, optimizer.param_groups[0]["lr"]))


class Manual(Automatic):
    """training_step is called once a step; the closure, once a pass, may hold micro-batches."""

    micro_batches = 1

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step

        def closure() -> Tensor:
            self.calls += 1
            total = torch.zeros(())
            for micro_batch in batch.chunk(self.micro_batches):
                loss = loss_fn(self.net, micro_batch, step) / self.micro_batches
                self.manual_backward(loss)
                total += loss.detach()
            return total

        self.optimizers().step(closure)
        self.lr_schedulers().step()


class ByPasses(Manual):
    """The loop, on the GXPO itself: self.optimizers() is a wrapper, and has no say in its steps."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = len(self.seen)  # the Trainer does not count these
        torch.manual_seed(step)
        for _ in self.optimizers().optimizer.passes():
            self.calls += 1
            self.manual_backward(loss_fn(self.net, batch, step))
        self.lr_schedulers().step()


class TwoMicroBatches(Manual):
    micro_batches = 2


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def trainer(steps: int = STEPS, **options: Any) -> Any:
    return lightning.Trainer(
        **{
            "max_epochs": steps // AN_EPOCH,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def fit(module: Automatic, steps: int = STEPS, ckpt_path: Path | None = None, **options: Any) -> Any:
    made = trainer(steps, **options)
    made.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=ckpt_path)
    return made


def plain(micro_batches: int = 1, autocast: str = "", **settings: Any) -> list[tuple[list[Tensor], Report, float]]:
    """The same batches in a loop of one's own."""
    net = network()
    optimizer = GXPO(torch.optim.AdamW(net.parameters(), lr=0.02), **{**SETTINGS, **settings})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    seen = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            total = torch.zeros(())
            for x in batches()[step % AN_EPOCH].chunk(micro_batches):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == "pass"):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
                        loss = loss_fn(net, x, step) / micro_batches
                    loss.backward()
                total += loss.detach()
            return total

        torch.manual_seed(step)
        optimizer.step(closure)
        scheduler.step()
        seen.append((values(net), optimizer.report, optimizer.param_groups[0]["lr"]))
    return seen


def same(ours: list[Any], theirs: list[Any], with_loss: bool = True) -> None:
    """Bit for bit, after every step."""
    assert len(ours) == len(theirs)
    for (p, report, lr), (q, other, rate) in zip(ours, theirs, strict=True):
        loss = {} if with_loss else {"loss": None}
        assert {**vars(report), **loss} == {**vars(other), **loss}
        assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
        assert lr == rate


def test_the_plain_run_falls_back_and_comes_back() -> None:
    """Otherwise the tests below would compare nothing of interest."""
    outcomes = [report.outcome for _, report, _ in plain()]
    assert outcomes[:7] == ["active"] * 5 + ["single"] * 2
    assert "active" in outcomes[7:]


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_a_fit_is_a_plain_loop(kind: type[Automatic]) -> None:
    """If not, Lightning's hooks, its zero_grad in the closure, or its count of steps would change the training."""
    module = kind()
    made = fit(module)
    same(module.seen, plain())
    assert module.calls == sum(report.passes for _, report, _ in module.seen)
    assert made.global_step == STEPS  # max_steps, logging and checkpoints go by it


def test_passes_in_manual_optimization_are_a_plain_loop_that_the_trainer_does_not_count() -> None:
    """If global_step moves some day, the README can drop its advice: till then max_steps would never end a fit, and
    ModelCheckpoint would save but once."""
    module = ByPasses()
    made = fit(module)
    same(module.seen, plain(), with_loss=False)
    assert made.global_step == 0


def test_micro_batches_in_the_closure_of_manual_optimization() -> None:
    """The way to accumulate gradients in Lightning."""
    module = TwoMicroBatches()
    made = fit(module)
    same(module.seen, plain(micro_batches=2))
    assert made.global_step == STEPS


def test_accumulate_grad_batches_is_refused() -> None:
    """Lightning runs the earlier micro-batches outside the closure, and the closure, of the last alone, is what GXPO
    repeats: the others' gradients would be dropped without a word."""
    with pytest.raises(RuntimeError, match=r"this step would lose them.*accumulate_grad_batches=1"):
        fit(Automatic(gate=None), 4, accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("at", [4, 6, 8])  # before the gate closes, in the cooldown, open again
def test_a_resumed_fit_goes_on_bit_for_bit(at: int, kind: type[Automatic], tmp_path: Path) -> None:
    """If not, a preempted run would re-arm its gate, or forget what is usual."""
    fit(kind(), at).save_checkpoint(tmp_path / "last.ckpt")
    module = kind()
    made = fit(module, STEPS, tmp_path / "last.ckpt")
    same(module.seen, plain()[at:])
    assert made.optimizers[0].gate_state.step == STEPS


def test_a_checkpoint_loads_into_the_base_alone(tmp_path: Path) -> None:
    """Evaluation scripts and plain runs have no GXPO."""
    made = fit(Automatic(), 4)
    made.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["gxpo"]["gate"]["step"] == 4
    base = torch.optim.AdamW(network().parameters())
    base.load_state_dict({k: v for k, v in saved.items() if k != "gxpo"})
    assert base.state_dict()["state"].keys() == made.optimizers[0].state_dict()["state"].keys()


def test_what_training_step_logs_is_of_every_pass() -> None:
    """A surprise in curves: on_step has the last pass's value, at theta~, an epoch's mean is over passes. report.loss,
    logged in on_train_batch_end, is the loss at theta0."""
    values_seen: list[float] = []

    class Logging(Automatic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            values_seen.append(loss.item())
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    module = Logging()
    made = fit(module, AN_EPOCH)
    assert len(values_seen) == 3 * AN_EPOCH
    assert made.logged_metrics["loss_step"].item() == values_seen[-1]
    assert made.logged_metrics["loss_epoch"].item() == pytest.approx(sum(values_seen) / len(values_seen), rel=1e-5)
    assert [report.loss for _, report, _ in module.seen] == values_seen[::3]


@pytest.mark.parametrize(("kind", "around"), [(Automatic, "forward"), (Manual, "pass"), (ByPasses, "pass")])
def test_bfloat16_is_autocast_in_every_pass(kind: type[Automatic], around: str) -> None:
    """Lightning's block is around training_step, in manual optimization around all passes; it keeps no casts. If it
    did, those of theta0 would serve every pass."""
    module = kind()
    fit(module, precision="bf16-mixed")
    same(module.seen, plain(autocast=around), with_loss=kind is not ByPasses)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_a_grad_scaler_of_lightnings_is_refused() -> None:
    """As "16-mixed" makes it on a GPU: it would hide skipped inner steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = Automatic()
    before = values(module.net)
    with pytest.raises(RuntimeError, match="cannot run under an enabled GradScaler"):
        fit(module, plugins=[plugin])
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), before, strict=True))


def test_gradient_clip_val_hides_the_norms() -> None:
    """Lightning clips inside the closure, every pass. max_grad_norm takes the same steps and sees the norms as they
    were; clipped before, they say nothing to the gate, and GXPO warns."""
    ours, theirs = Automatic(gate=None, max_grad_norm=0.05), Automatic(gate=None, max_grad_norm=None)
    fit(ours)
    with pytest.warns(UserWarning, match="is it clipped in the closure"):
        fit(theirs, gradient_clip_val=0.05)
    for (p, _, _), (q, _, _) in zip(ours.seen, theirs.seen, strict=True):
        for a, b in zip(p, q, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert min(report.grad_norms[0] for _, report, _ in ours.seen) > 0.06
    assert max(max(report.grad_norms) for _, report, _ in theirs.seen) < 0.05 + 1e-6


def test_gradient_clip_val_is_refused_in_manual_optimization() -> None:
    """By Lightning; max_grad_norm is the way in both."""
    with pytest.raises(lightning.pytorch.utilities.exceptions.MisconfigurationException, match="manual optimization"):
        fit(Manual(), gradient_clip_val=1.0)


@pytest.mark.parametrize("form", ["passes", "lookahead"])
def test_passes_and_lookahead_of_lightnings_wrapper_are_an_error(form: str) -> None:
    """self.optimizers() only looks like a GXPO: what it is told to keep, the optimizer beneath does not know. Whoever
    forgets `.optimizer` must not train something else in silence."""

    class Forgetful(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if form == "passes":
                for _ in optimizer.passes():
                    self.manual_backward(loss_fn(self.net, batch, 0))
            else:
                optimizer.zero_grad()
                self.manual_backward(loss_fn(self.net, batch, 0))
                while optimizer.lookahead():
                    self.manual_backward(loss_fn(self.net, batch, 0))
                optimizer.step()

    module = Forgetful()
    before = values(module.net)
    with pytest.raises(RuntimeError, match="only looks like a GXPO"):
        fit(module)
    assert module.seen == []
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), before, strict=True))


def test_lookahead_on_the_optimizer_itself() -> None:
    """For a module that brings its own backward: its step, too, has to be the optimizer's own."""

    class ByLookahead(ByPasses):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            step, optimizer = len(self.seen), self.optimizers().optimizer
            optimizer.zero_grad()
            torch.manual_seed(step)
            self.manual_backward(loss_fn(self.net, batch, step))
            while optimizer.lookahead():
                torch.manual_seed(step)  # lookahead() replays no random numbers
                self.manual_backward(loss_fn(self.net, batch, step))
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()

    module = ByLookahead()
    fit(module)
    for (p, report, _), (q, other, _) in zip(module.seen, plain(), strict=True):
        assert report.outcome == other.outcome
        for a, b in zip(p, q, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the last clip is Lightning's


def test_an_exception_in_training_step_leaves_no_trace() -> None:
    """An interrupted fit saves a checkpoint: it must not hold theta1."""

    class Fails(Automatic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.calls == 5:  # the last pass of the second step
                raise MemoryError
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(MemoryError):
        fit(module)
    assert len(module.seen) == 1
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), module.seen[0][0], strict=True))
