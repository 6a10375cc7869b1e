"""What every picture shares: colours, the style, how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's colours, told apart by all eyes; GXPO is the thick one.
COLOURS = {
    "grpo": "#000000",
    "grpo-epochs": "#56B4E9",
    "grpo-scaled": "#E69F00",
    "sfpo": "#CC79A7",
    "lookahead": "#009E73",
    "gxpo": "#D55E00",
    "gxpo-displacement": "#0072B2",
    "gxpo-tensor": "#8C6D31",
    "gxpo-restore": "#7F7F7F",
    "gxpo-gate": "#8A2BE2",
}
STYLE: dict[RcKeyType, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.w_pad": 0.1,  # inches: titles stand at the very edge otherwise
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "gxpo",  # the same picture, the same file
}


def save(figure: Figure, folder: Path, name: str, quick: bool) -> list[Path]:
    """As PNG and, where it need not be quick, SVG; what was written."""
    written = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(written[0])
    if quick:
        return written[:1]
    figure.set_layout_engine("none")  # all is in its place: finding it again would take as long as drawing
    figure.savefig(written[1], metadata={"Date": None})
    return written
