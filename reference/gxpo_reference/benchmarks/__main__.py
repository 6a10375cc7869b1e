"""Makes `python -m gxpo_reference.benchmarks` the command."""

from __future__ import annotations

import sys

try:
    from gxpo_reference.benchmarks.cli import main
except ModuleNotFoundError as missing:
    sys.exit(f"gxpo_reference.benchmarks needs {missing.name}: pip install torch")

main()
