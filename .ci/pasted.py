"""gxpo.py as it lies in somebody's typed project, and README's snippets as that project's code, before the checkers.

In a folder of its own, with no settings of this project: `mypy --strict` on the copy, pyright in its standard mode on
the copy and on every snippet. What README calls yours (`model`, `loader`, `loss_fn`) is Any there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
YOURS = """\
from typing import Any

import torch
from gxpo import GXPO


def yours() -> Any: ...


GRPOConfig = batches = dataset = folder = loader = loss_fn = model = reward = yours()
"""
# Mark of a snippet -> what stands before it. torch's own pages use dcp.save, which checkers find not exported.
GIVEN = {
    "dcp.": "# pyright: reportPrivateImportUsage=false\n"
    "optimizer = GXPO(torch.optim.AdamW(model.parameters(), lr=1e-6))\n"
}


def snippets() -> dict[str, str]:
    """File name -> code. What stands before the trainers is one program; each of theirs stands alone."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    trainers = readme[readme.index("## In your trainer") : readme.index("## Check it")]
    alone = [text for text in blocks if text in trainers]
    made = {"readme_use_it.py": "\n\n".join(text for text in blocks if text not in trainers)}
    for n, text in enumerate(alone, 1):
        given = "".join(code for mark, code in GIVEN.items() if mark in text)
        made[f"readme_trainer_{n}.py"] = f"{YOURS}{given}\n{text}"
    return made


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "gxpo.py", folder)
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}', encoding="utf-8")
        for file, code in snippets().items():
            (folder / file).write_text(code, encoding="utf-8")
        python = [sys.executable, "-m"]
        status = 0
        for command in ([*python, "mypy", "--strict", "gxpo.py"], [*python, "pyright", "--pythonpath", sys.executable]):
            status |= subprocess.run(command, cwd=folder, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
