"""Which files are the project's."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


@functools.cache
def files_of_the_project() -> list[str]:
    """Whatever is not ignored, committed or not; everything where there is no git (an unpacked sdist)."""
    if (ROOT / ".git").exists():
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [name for name in names if (ROOT / name).is_file()]
    kept = (p for p in ROOT.rglob("*") if p.is_file() and not {"__pycache__", ".venv"} & set(p.parts))
    return [str(p.relative_to(ROOT)) for p in kept]
