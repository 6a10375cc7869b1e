"""The command python -m gxpo_reference.benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gxpo import STATE_POLICIES
from gxpo_reference.benchmarks import growth, measure, memory, overhead, stages, steps
from gxpo_reference.benchmarks.cuda_day import cli as cuda_day
from gxpo_reference.benchmarks.models import (
    HEADS,
    LENGTH,
    SIZES,
    Problem,
    Shapes,
    short,
    tensors,
    transformer,
    transformer_shapes,
)
from gxpo_reference.benchmarks.tables import environment, text

WHAT = ("steps", "stages", "memory", "growth", "overhead")
DESCRIPTION = """\
What a GXPO step costs, as ratios within one run. Contenders take turns in rounds, each right beside the plain steps
that it is compared with; figures are medians and quartiles over the rounds, the first of which is dropped.

  steps     whole steps of a transformer, each against as many plain clipped AdamW steps as it makes backward passes
            (floor 1.00): GXPO with each setting, after fallback, SFPO, and GXPO as one would first write it down
  stages    what GXPO does besides backward passes and the optimizer's own step, pass by pass, against a copy_() of as
            many bytes as it must at least read and write
  memory    peak memory beyond plain AdamW training, in parameter-sized buffers
  growth    steps and stages from 1e5 to 1e8 parameters, of a transformer and of big tensors with a gradient that costs
            next to nothing; sizes that do not fit are skipped
  overhead  what GXPO adds to three plain steps, as a share of them, where gradients cost nothing: on one thread, for
            large tensors, LoRA's, and many small ones
  all       these five

  cuda-day  everything that has to be seen on a GPU, tests and suite included, and one report: cuda-day --help
"""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "python -m gxpo_reference.benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "what", nargs="?", choices=(*WHAT, "all"), default="steps", help="what to measure (default: %(default)s)"
    )
    options.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    for name, default, meaning in (
        ("--width", 320, "of the transformer"),
        ("--layers", 7, "with the width about 10M parameters"),
        ("--batch", 16, f"sequences of {LENGTH} tokens"),
        ("--rounds", 7, "that count, after one that warms up"),
    ):
        about = f"{meaning} (default: %(default)s)"
        options.add_argument(name, type=_positive, metavar="N", default=default, help=about)
    options.add_argument("--threads", type=_positive, metavar="N", help="of torch, on a CPU (default: torch's own)")
    options.add_argument(
        "--clock",
        choices=sorted(measure.CLOCKS),
        default="wall",
        help="cpu: this process's CPU time, which leaves out most of what others do on a shared machine; with "
        "--threads 1, as waiting threads count (default: %(default)s)",
    )
    options.add_argument(
        "--sizes",
        type=_positive,
        nargs="+",
        metavar="N",
        help="of parameters, for growth (default: 1e5 1e6 1e7 1e8); for overhead: the tensors of transformers with so "
        f"many, out of {', '.join(map(short, SIZES))}, in place of its own table",
    )
    options.add_argument(
        "--optimizer-state",
        choices=STATE_POLICIES,
        nargs="+",
        default=["keep"],
        help="GXPO's, for overhead; steps and stages have both (default: keep)",
    )
    options.add_argument("--out", type=Path, metavar="FILE.json", help="write every timing there, too")
    options.add_argument(
        "--quick", action="store_true", help="seconds, to see that it runs: tiny sizes, two rounds, figures of no worth"
    )
    return options


def _positive(given: str) -> int:
    try:
        value = int(given) if given.isdigit() else int(float(given))  # 1e8
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number, 1 or more, got {given}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["cuda-day"]:
        sys.exit(cuda_day.main(arguments[1:]))
    options = parser()
    given = options.parse_args(arguments)
    if given.quick:
        given.width, given.layers, given.batch, given.rounds = 16, 1, 1, 2
    if given.what == "overhead" and (unknown := [size for size in given.sizes or () if size not in SIZES]):
        options.error(f"--sizes of overhead must be out of {', '.join(map(short, SIZES))}, got {unknown[0]}")
    if given.width % HEADS:
        options.error(f"--width must be a multiple of {HEADS}, got {given.width}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        options.error(f"--device {given.device}: torch sees no CUDA device")
    if given.out and not given.out.absolute().parent.is_dir():
        options.error(f"--out {given.out}: no such folder")
    if given.clock == "cpu" and (given.threads != 1 or given.device != "cpu"):
        options.error("--clock cpu needs --threads 1 and --device cpu")

    if given.threads:
        torch.set_num_threads(given.threads)
    measure.clock = given.clock
    device, dtype, began = given.device, getattr(torch, given.dtype), time.monotonic()
    machine = environment(device)
    cores = f"{machine['cores']} cores, {machine['threads']} threads"
    print(f"{machine['device']} ({cores}), torch {machine['torch']}, AdamW, {given.clock} time")
    results: dict[str, Any] = {}
    sizes = given.sizes or ([1000, 100_000] if given.quick else [10**5, 10**6, 10**7, 10**8])
    shapes: dict[str, Shapes] = overhead.QUICK if given.quick else overhead.SHAPES
    if given.what == "overhead" and given.sizes:
        shapes = {f"transformer, {short(size)}": transformer_shapes(*SIZES[size]) for size in given.sizes}

    def model() -> Problem:
        return transformer(given.width, given.layers, given.batch, device, dtype)

    def show(what: str, about: str, rows: list[tuple[str, ...]]) -> None:
        print(f"\n{what}: {about}\n{text(rows)}", flush=True)

    wanted = WHAT if given.what == "all" else (given.what,)
    if "steps" in wanted:
        results["steps"] = steps.measure(model(), device, given.rounds)
        show("steps", results["steps"]["problem"], steps.table(results["steps"], device))
    if "stages" in wanted:
        results["stages"] = stages.measure(model(), device, given.rounds)
        show("stages", results["stages"]["problem"], stages.table(results["stages"]))
    if "memory" in wanted:
        parameters = transformer_shapes(given.width, given.layers)  # without its activations
        results["memory"] = memory.measure(tensors(parameters, device, dtype, "transformer's tensors"), device)
        about = f"{results['memory']['problem']}; {results['memory']['method']}"
        show("memory", about, memory.table(results["memory"]))
    if "growth" in wanted:
        results["growth"] = growth.measure(sizes, given.batch, device, dtype, given.rounds)
        about = f"{given.dtype}, transformers with {given.batch * LENGTH:,} tokens"
        show("growth", about, growth.table(results["growth"]))
    if "overhead" in wanted:  # last, for it changes how memory is given back
        results["overhead"] = overhead.measure(shapes, given.optimizer_state, device, dtype, given.rounds)
        show("overhead", f"{given.dtype}, gradients for nothing", overhead.table(results["overhead"], device))

    if given.out:
        config = {name: value for name, value in vars(given).items() if name != "out"}
        record = {
            "config": config,
            "environment": machine,
            "environment_after": environment(device),
            "seconds": time.monotonic() - began,
            "results": results,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {given.out}")
