from __future__ import annotations

from gxpo_reference.bench.cli import main

main()
