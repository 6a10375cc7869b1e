"""Where a day was spent: python -m gxpo_reference.benchmarks.cuda_day.facts DEVICE FILE.json."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from gxpo_reference.benchmarks.measure import free_bytes
from gxpo_reference.benchmarks.tables import environment

PACKAGES = ("numpy", "triton", "transformers", "trl", "peft", "accelerate", "lightning", "jax", "pytest")


def facts(device: str) -> dict[str, Any]:
    """Of the machine, and of the packages that the parts run with. Raises where the device computes nothing right."""
    found = environment(device)
    if device == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{about.major}.{about.minor}",
            "built_for": " ".join(torch.cuda.get_arch_list()),
            "driver": collect_env.get_nvidia_driver_version(collect_env.run),
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            "memory": about.total_memory,
            "visible_gpus": torch.cuda.device_count(),
        }
    found["free_memory"] = free_bytes(device)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    x = torch.eye(64, device=device) + 1.0  # what a torch that was not built for this GPU cannot do
    total = (x @ x).sum().item()
    if total != 64 * (1 + 2 * 64 + 64 * 64):
        raise RuntimeError(f"{found['device']} computes wrong: the sum of (I + 1)^2 came out as {total}")
    return {**found, "packages": versions}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(facts(sys.argv[1]), indent=1) + "\n", encoding="utf-8")
    print(collect_env.get_pretty_env_info())  # all of it, for the log
