"""The demo's picture: images without and with the trigger, and the network before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..plots import INK, KEPT, MUTED, draw_cut, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..result import DefenseResult
    from .attacks import Trigger
    from .digits import Digits

COLUMNS = 5


def demo_figure(
    digits: Digits,
    trigger: Trigger | None,
    before: dict[str, float | None],
    after: dict[str, float | None],
    result: DefenseResult,
) -> Figure:
    """Draw one figure, 11 by 3.4 inches at 150 dots an inch."""
    figure = Figure(figsize=(11, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.35, 1, 1.2])
    _images(left, digits, trigger)
    _bars(middle, before, after)
    _curve(right, result)
    return figure


def _images(axes: Axes, digits: Digits, trigger: Trigger | None) -> None:
    images = digits.test[0][:COLUMNS]
    rows = [images] if trigger is None else [images, trigger(images)]
    padded = [torch.nn.functional.pad(row, (1, 1, 1, 1), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    height = padded[0].shape[2]
    names = ["clean", "with trigger"][: len(rows)]
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], names, color=MUTED)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Held-back images", loc="left", fontsize=10, color=INK)


def _bars(axes: Axes, before: dict[str, float | None], after: dict[str, float | None]) -> None:
    style_axes(axes)
    names = {"accuracy": "clean accuracy", "asr": "attack success"}
    shown = [key for key in names if before[key] is not None]
    places = np.arange(len(shown))
    for offset, values, colour, label in (
        (-0.2, before, MUTED, "before"),
        (0.2, after, KEPT, "after"),
    ):
        heights = [float(values[key] or 0) for key in shown]
        bars = axes.bar(places + offset, heights, 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, color=INK)
    axes.set_xticks(places, [names[key] for key in shown])
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel("percent")
    axes.set_title("Defense with 100 clean images", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.02))


def _curve(axes: Axes, result: DefenseResult) -> None:
    style_axes(axes)
    draw_cut(axes, result)
    axes.set_ylim(-3, 116)
    axes.set_yticks([0, 50, 100])
    axes.set_xlabel("neurons pruned, lowest mask first")
    axes.set_ylabel("percent of clean images")
    axes.set_title(_verdict(result), loc="left", fontsize=10, color=INK)
    lines = axes.get_lines()[:2]  # the title tells the cut
    axes.legend(
        handles=lines,
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="upper right",
        bbox_to_anchor=(1, 1.02),
        handlelength=1.5,
    )


def _verdict(result: DefenseResult) -> str:
    if result.repaired is not None:
        return f"{result.cut.pruned} neurons cut, the rest repaired; suspect: {result.suspect}"
    if not result.cut.pruned:
        return f"Nothing cut; suspect: {result.suspect}"
    return f"The cut: {result.cut.pruned} neurons; suspect: {result.suspect}"
