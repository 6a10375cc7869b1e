"""GRPO with GXPO on a reward that can be checked, in TRL: repeat the digit that you are given.

    python -m gxpo_reference.trainers.trl_example                     # a tiny random Qwen2, on a CPU, without a network
    python -m gxpo_reference.trainers.trl_example --model Qwen/Qwen2.5-0.5B-Instruct --device cuda --lr 1e-6
    python -m gxpo_reference.trainers.trl_example --plain             # TRL's own trainer, to compare with

A completion's reward is the share of its characters that are the digit. Prints what GXPO did in every step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

try:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]  # trl's own way to export them
except ModuleNotFoundError as missing:
    sys.exit(f'trl_example needs {missing.name}: pip install "gxpo[trl]" (from a checkout: pip install -e ".[trl]")')

from gxpo_reference.trainers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from gxpo_reference.trainers.trl_gxpo import GXPOTrainer

COLUMNS = (  # heading, logged name, format
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("norm", "grad_norm", "{:.3f}"),  # of the last pass, before clipping
    ("passes", "gxpo/passes", "{:.0f}"),
    ("mean q", "gxpo/mean_q", "{:.2f}"),
    ("multiplier", "gxpo/multiplier", "{:.2f}"),
    ("z", "gxpo/z", "{:.1f}"),
)


def share_of_the_digit(completions: list[str], digit: list[str], **_: Any) -> list[float | None]:
    """Of each completion's characters, white space left out; 0 for an empty one."""
    characters = ["".join(completion.split()) for completion in completions]
    return [text.count(d) / max(1, len(text)) for text, d in zip(characters, digit, strict=True)]


class Table(TrainerCallback):
    """One line a step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.multipliers: list[float] = []
        self.passes = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        print("step", *(f"{heading:>10}" for heading, *_ in COLUMNS), " gate", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "reward" not in logs:
            return
        cells = [form.format(logs[name]) if logs.get(name) is not None else "-" for _, name, form in COLUMNS]
        gate = "-" if "gxpo/passes" not in logs else "closed" if "gxpo/fallback_step" in logs else "open"
        print(f"{state.global_step:>4}", *(f"{cell:>10}" for cell in cells), "", gate, flush=True)
        self.rewards.append(logs["reward"])
        self.multipliers += [logs["gxpo/multiplier"]] if "gxpo/multiplier" in logs else []
        self.passes += logs.get("gxpo/passes", 1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `argv` without the program's name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gxpo_reference.trainers.trl_example",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--model", default="tiny-qwen2", help=f"{', '.join(ARCHITECTURES)} or an id on the hub")
    parser.add_argument("--steps", type=int, default=20, help="outer steps, one rollout each")
    parser.add_argument("--horizon", type=int, default=5, help="K, the steps to predict")
    parser.add_argument("--alpha", type=float, default=0.5, help="part of the way to the predicted point")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW; 1e-6 or so for a trained model")
    parser.add_argument("--plain", action="store_true", help="TRL's GRPOTrainer, without GXPO")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", help="where checkpoints go; none are kept without it")
    options = parser.parse_args(argv)

    tiny = options.model in ARCHITECTURES
    if tiny:
        torch.set_num_threads(1)  # a second one has too little to do
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)  # between TRL and transformers
    prompts = [f"repeat the digit {digit} :" for digit in "0123456789"]
    table = Table()
    with tempfile.TemporaryDirectory() as nowhere:
        config = GRPOConfig(
            output_dir=options.out or nowhere,
            save_strategy="steps" if options.out else "no",
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda",  # not fp16: GXPO takes no GradScaler
            gradient_checkpointing=not tiny,
            model_init_kwargs=None if tiny else {"dtype": "float32"},  # in bfloat16 a step of 1e-6 rounds away
            max_steps=options.steps,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=40 if tiny else 16,
            num_generations=8,
            max_completion_length=8 if tiny else 16,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        gxpo = {"horizon": options.horizon, "alpha": options.alpha}
        trainer = (GRPOTrainer if options.plain else partial(GXPOTrainer, gxpo=gxpo))(
            model=tiny_model(options.model, hidden=32) if tiny else options.model,
            reward_funcs=share_of_the_digit,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts, "digit": list("0123456789")}),
            processing_class=tiny_tokenizer() if tiny else None,
            callbacks=[table],
        )
        trainer.remove_callback(PrinterCallback)  # the table has it
        trainer.train()
    part = max(1, len(table.rewards) // 4)
    first, last = (sum(rewards) / part for rewards in (table.rewards[:part], table.rewards[-part:]))
    rule = "GRPO" if options.plain else f"GXPO, K = {options.horizon}, alpha = {options.alpha}"
    print(
        f"{rule}: mean reward {first:.3f} over the first quarter, {last:.3f} over the last; "
        f"{len(table.rewards)} steps, {table.passes:.0f} passes"
    )
    if table.multipliers:
        rate = options.lr * sum(table.multipliers) / len(table.multipliers)
        print(f"To know what that is worth: --plain --lr {rate:.2g} moves about as far, at one pass a step")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
