"""A picture of every attack: digits, the same with the trigger, and what has changed.

python -m benchmarks.attacks                       # docs/images/attacks.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from mnp_fast.demo.digits import load_digits
from mnp_fast.plots import INK, MUTED

from . import ATTACKS, poison

ROOT = Path(__file__).parent.parent.parent
ROWS = 2  # of attacks
IMAGES = 3


def main(
    image: Annotated[Path, typer.Option(help="File to write.")] = (
        ROOT / "docs" / "images" / "attacks.png"
    ),
    seed: Annotated[int, typer.Option(help="Of digits and triggers.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 16,
) -> None:
    """Draw all attacks, ten inches wide."""
    digits = load_digits(seed, size)
    figure = Figure(figsize=(10, 4.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(ROWS, len(ATTACKS) // ROWS).flat
    for axes, (name, attack) in zip(panels, ATTACKS.items(), strict=True):
        poisoned = poison(attack, *digits.train, seed)
        shown = poisoned.chosen[:IMAGES]
        clean, triggered = digits.train[0][shown], poisoned.images[shown]
        change = (0.5 + triggered - clean).clamp(0, 1)
        axes.imshow(_sheet([clean, triggered, change]), interpolation="nearest")
        axes.set_title(name, fontsize=9, color=INK)
        axes.axis("off")
    figure.supxlabel(
        "Columns: training image, poisoned image, change (grey: none)", fontsize=9, color=MUTED
    )
    figure.savefig(image, format="png")


def _sheet(columns: list[Tensor]) -> Tensor:
    padded = [F.pad(column, (1, 1, 1, 1), value=1.0) for column in columns]
    return torch.cat([torch.cat(list(column), 1) for column in padded], 2).permute(1, 2, 0)


if __name__ == "__main__":
    typer.run(main)
