"""What README.md promises: its snippets run, its numbers are printed, its first block is two commands."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project_files import ROOT
from torch import Tensor, nn

import gxpo
from gxpo_conformance.adapters import torch as torch_adapter
from gxpo_conformance.clauses.table import SPEC_VERSION
from gxpo_conformance.mutants import MUTANTS
from gxpo_conformance.runs import play
from gxpo_conformance.trial import judge

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
TRAINERS = README[README.index("## In your trainer") : README.index("## Check it")]


def test_the_first_sh_block_is_two_commands() -> None:
    lines = [line for line in next(text for kind, text in BLOCKS if kind == "sh").splitlines() if line.strip()]
    assert len(lines) == 2
    assert "gxpo-conformance" in lines[0]
    assert "pytest" in lines[1]


def test_snippets_run_in_order_and_print_what_is_shown() -> None:
    """People paste them. A text block after a snippet is what it prints."""
    names: dict[str, Any] = {}
    ran = 0
    for (kind, text), (next_kind, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "python" or text in TRAINERS:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README.md", "exec"), names)
        ran += 1
        if next_kind == "text":
            assert printed.getvalue() == shown
    assert ran == 4
    assert names["optimizer"].report.outcome == "active"


def trainers(mark: str) -> str:
    """The one snippet for trainers that has `mark` in it."""
    (text,) = [text for kind, text in BLOCKS if kind == "python" and text in TRAINERS and mark in text]
    return text


def small() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(4, 2), lambda model, batch: model(batch).square().mean()


def test_every_trainers_snippet_is_tested() -> None:
    assert sum(kind == "python" and text in TRAINERS for kind, text in BLOCKS) == 4


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning")
def test_the_snippet_for_trl_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model made in memory in place of one from a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[trl]'")
    from datasets import Dataset

    from gxpo_reference.trainers.tiny_models import tiny_model, tiny_tokenizer

    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 2, "report_to": "none"}
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 3, "disable_tqdm": True}
    text = trainers("GXPOTrainer").replace('"Qwen/Qwen2.5-1.5B-Instruct"', "model, processing_class=tokenizer")
    names = {
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "GRPOConfig": functools.partial(trl.GRPOConfig, **settings, **sizes),
        "reward": lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        "dataset": Dataset.from_dict({"prompt": ["repeat the digit 4 :"] * 8}),
    }
    exec(compile(text, "README.md", "exec"), names)
    assert names["trainer"].gxpo.report.step == 1
    assert names["trainer"].gxpo.report.passes == 3


def test_the_snippet_for_accelerate_trains() -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[trainers]'")
    from accelerate.state import AcceleratorState, GradientState

    model, loss_fn = small()
    loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
    names = {"torch": torch, "GXPO": gxpo.GXPO, "model": model, "loss_fn": loss_fn, "loader": loader}
    exec(compile(trainers("Accelerator"), "README.md", "exec"), names)
    assert names["optimizer"].report.step == 1
    assert names["optimizer"].report.passes == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_the_snippet_for_lightning_trains(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install -e '.[trainers]'")
    model, loss_fn = small()
    names = {"torch": torch, "GXPO": gxpo.GXPO, "loss_fn": loss_fn}
    exec(compile(trainers("LightningModule"), "README.md", "exec"), names)
    policy = names["Policy"](model)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    trainer.fit(policy, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))
    assert trainer.optimizers[0].report.step == 1
    assert trainer.optimizers[0].report.passes == 3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's own, of its checkpoints
def test_the_snippet_for_sharded_checkpoints_resumes(tmp_path: Path) -> None:
    """On one process here; tests/test_distributed.py does the same with shards."""
    model, loss_fn = small()
    optimizer = gxpo.GXPO(torch.optim.AdamW(model.parameters(), lr=0.1))
    optimizer.step(lambda: (loss := loss_fn(model, torch.ones(3, 4)), loss.backward())[0])
    names = {"model": model, "optimizer": optimizer, "folder": tmp_path / "kept"}
    exec(compile(trainers("dcp.save"), "README.md", "exec"), names)
    assert optimizer.gate_state.step == 1


def test_the_verdict_shown_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fixed cases alone: what the awkward runs say of gxpo.py is test_conformance.py's."""
    monkeypatch.setattr(play, "planned", lambda clause: ())
    monkeypatch.setattr(play, "RANDOM_RUNS", dict.fromkeys(play.RANDOM_RUNS, 0))
    verdict = judge(torch_adapter.Port(), ["float64", "float32"])
    assert f"GXPO {SPEC_VERSION}: {verdict.headline}\nverdict: {verdict.words}\n" in README


def test_the_number_of_mutants_is_the_number() -> None:
    assert f"tested by {len(MUTANTS)} wrong implementations" in README


def test_the_argument_tables_are_complete_and_their_defaults_true() -> None:
    """A table that lies about a default costs somebody a training run."""
    opt = gxpo.GXPO(gxpo.torch.optim.SGD([gxpo.torch.ones(1, requires_grad=True)], lr=0.1))
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", README, re.M))
    for name in gxpo.GXPO._SETTINGS:
        assert rows[name] == ("Gate()" if name == "gate" else repr(getattr(opt, name)).replace("'", '"')), name
    for name in gxpo.Gate.__dataclass_fields__:
        assert re.search(rf"^\| (`\w+`, )*`{name}`", README, re.M), name
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]*) \|", README, re.M):
        for name, value in zip(re.findall(r"\w+", names), values.replace("`", "").split(", "), strict=True):
            if name in gxpo.Gate.__dataclass_fields__:
                assert value == repr(getattr(gxpo.Gate(), name)).replace("'", '"'), name


def test_the_first_block_of_costs_holds() -> None:
    """Passes are counted by the suite (CST-01), memory in test_step.py; the copy of the state is optional."""
    assert "| backward passes | 3, whatever K (SFPO: K + 1) | 1 |" in README


def test_gxpo_py_stands_alone() -> None:
    """People copy the one file: it may import torch and the standard library only, and says what it is."""
    text = Path(gxpo.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    assert imported <= {"__future__", "torch", "bisect", "contextlib", "dataclasses", "functools", "json", "math",
                        "collections", "copy", "types", "typing", "warnings"}  # fmt: skip
    head = "\n".join(text.splitlines()[:3])
    assert f"gxpo.py {gxpo.__version__}" in head
    assert f"conformance spec {gxpo.SPEC_VERSION}" in head
    assert "MIT" in head
