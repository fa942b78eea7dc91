"""Figures of a defense's result.

Every function returns a matplotlib `Figure` made through the object interface: no global state, no
display. Save one with `figure.savefig(...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import DefenseResult

INK = "#1f2933"
MUTED = "#6b7785"
GRID = "#e4e8ec"
KEPT = "#2f6f9f"
PRUNED = "#c8442b"
EXPOSED = "#b07a1e"
PHASES = {
    "suppress": ("Suppression", EXPOSED),
    "fit": ("Mask fitting", KEPT),
    "repair": ("Repair", PRUNED),
}
BINS = 40
SIZE = (5.2, 3.2)


def mask_histogram(result: DefenseResult) -> Figure:
    """How many neurons have which fitted mask, pruned and kept stacked, counts logarithmic."""
    masks = {name: layer.mask.numpy() for name, layer in result.neurons.items()}
    pruned = {(neuron.layer, neuron.index) for neuron in result.pruned}
    cut = np.concatenate(
        [
            np.array([(name, index) in pruned for index in range(len(values))], dtype=bool)
            for name, values in masks.items()
        ]
    )
    values = np.concatenate(list(masks.values()))
    figure, axes = single()
    groups = [
        (values[cut], PRUNED, f"Pruned ({cut.sum():,})"),
        (values[~cut], KEPT, f"Kept ({(~cut).sum():,})"),
    ]
    axes.hist(
        [group[0] for group in groups],
        bins=np.linspace(0, 1, BINS + 1).tolist(),
        stacked=True,
        color=[group[1] for group in groups],
        label=[group[2] for group in groups],
        edgecolor="white",
        linewidth=0.4,
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlim(0, 1)
    axes.set(xlabel="Fitted mask", ylabel="Neurons (log)")
    legend(axes)
    return figure


def accuracy_curve(result: DefenseResult) -> Figure:
    """Clean accuracy and the exposure's success in percent against neurons pruned, with the cut."""
    figure, axes = single()
    draw_cut(axes, result)
    axes.set_ylim(-3, 103)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set(xlabel="Neurons pruned, lowest mask first", ylabel="Percent of clean images")
    legend(axes, ncols=3)
    return figure


def draw_cut(axes: Axes, result: DefenseResult) -> None:
    """Draw the two lines of a result's curve and the cut that was chosen."""
    pruned = [point.pruned for point in result.curve]
    for values, colour, label in (
        ([point.accuracy for point in result.curve], KEPT, "Clean accuracy"),
        ([point.exposed for point in result.curve], EXPOSED, "Exposure's success"),
    ):
        axes.plot(
            pruned,
            values,
            color=colour,
            linewidth=1.8,
            marker="o" if len(pruned) <= BINS else None,
            markersize=3,
            label=label,
        )
    cut = result.cut
    label = f"Cut: {cut.pruned:,}" if cut.pruned else "Nothing cut"
    axes.plot([cut.pruned] * 2, [0, 100], color=PRUNED, linewidth=1, dashes=(4, 3), label=label)
    for value, colour in ((cut.accuracy, KEPT), (cut.exposed, EXPOSED)):
        axes.plot(cut.pruned, value, "o", color=colour, markersize=7, markeredgecolor="white")


def magnitude_saliency(result: DefenseResult) -> Figure:
    """Saliency against weight magnitude of every neuron, both logarithmic, coloured by depth.

    Pruned neurons are ringed. Neurons of magnitude or saliency 0 are drawn on the lower border.
    """
    figure, axes = single()
    layers = list(result.neurons.items())
    cmap = colormaps["viridis"]
    colours = cmap(np.linspace(0.05, 0.9, len(layers)))
    magnitudes = [layer.magnitude.numpy() for _, layer in layers]
    saliencies = [layer.saliency.numpy() for _, layer in layers]
    floors = floor(magnitudes), floor(saliencies)
    for index in range(len(layers)):
        axes.scatter(
            np.maximum(magnitudes[index], floors[0]),
            np.maximum(saliencies[index], floors[1]),
            s=9,
            color=colours[index],
            alpha=0.75,
            linewidths=0,
        )
    ringed = [
        (
            max(float(result.neurons[neuron.layer].magnitude[neuron.index]), floors[0]),
            max(float(result.neurons[neuron.layer].saliency[neuron.index]), floors[1]),
        )
        for neuron in result.pruned
    ]
    if ringed:
        x, y = zip(*ringed, strict=True)
        axes.scatter(
            x, y, s=34, facecolors="none", edgecolors=PRUNED, linewidths=1.1, label="Pruned"
        )
        legend(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="Magnitude (l1 norm of the weights)", ylabel="Saliency (|Δ loss|, first order)")
    if len(layers) > 1:
        bounds = np.arange(len(layers) + 1) + 0.5
        mappable = ScalarMappable(BoundaryNorm(bounds, len(layers)), ListedColormap(colours))
        bar = figure.colorbar(mappable, ax=axes, pad=0.02, aspect=28)
        bar.set_ticks(sorted({1, (len(layers) + 1) // 2, len(layers)}))
        bar.set_label("Layer, from the input", color=MUTED, fontsize=9)
        bar.ax.tick_params(length=0, labelsize=8.5, colors=MUTED)
        bar.outline.set_visible(False)
    return figure


def objective_history(result: DefenseResult) -> Figure:
    """Each phase's objective by epoch, one panel a phase."""
    phases = list(dict.fromkeys(record.phase for record in result.history))
    figure = canvas()
    panels = figure.subplots(1, max(len(phases), 1), squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=False):
        style_axes(axes)
        title, colour = PHASES.get(phase, (phase, INK))
        records = [record for record in result.history if record.phase == phase]
        axes.plot(
            [record.epoch for record in records],
            [record.loss for record in records],
            color=colour,
            linewidth=1.8,
            marker="o" if len(records) <= BINS else None,
            markersize=3,
        )
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set(xlabel="Epoch")
    if phases:
        panels[0].set_ylabel("Objective")
    else:
        style_axes(panels[0])
        panels[0].set(xlabel="Epoch", ylabel="Objective")
    return figure


def canvas(size: tuple[float, float] = SIZE) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def single() -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = canvas()
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the look that all figures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=9.5)


def legend(axes: Axes, ncols: int = 2) -> None:
    """A legend above the axes, where it covers no data."""
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=ncols,
        borderaxespad=0.2,
        handletextpad=0.5,
    )


def floor(values: list[NDArray[np.floating[Any]]]) -> float:
    """The smallest positive value, so that zeros show on a logarithmic axis."""
    everything = np.concatenate(values)
    positive = everything[everything > 0]
    return float(positive.min()) if len(positive) else 1.0
