"""Figures of neuron statistics and of detection; as those of `mnp_fast.plots`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .plots import (
    EXPOSED,
    GRID,
    INK,
    KEPT,
    MUTED,
    PRUNED,
    canvas,
    floor,
    legend,
    single,
    style_axes,
)
from .stats.correlation import Array, spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from .result import DefenseResult
    from .stats import NeuronStats

Floats = NDArray[np.floating[Any]]

COLUMNS = 5
LAYERS = 25  # panels at most
PANEL = (2.1, 1.75)  # inches
COLOURS = (KEPT, PRUNED, EXPOSED, MUTED)
ATTACK_COLOURS = ("#2f6f9f", "#b07a1e", "#5d8a4a", "#7a5aa6", "#3aa6a0", "#a65a7a", "#8a8f98")


def by_layer(
    magnitudes: Mapping[str, Floats],
    saliencies: Mapping[str, Floats],
    suspects: Collection[tuple[str, int]] = (),
    *,
    name: str = "Suspect",
    xlabel: str = "Magnitude (l1 norm)",
    ylabel: str = "Saliency",
) -> Figure:
    """Saliency against magnitude, a panel a layer; logarithmic where they span a decade.

    Parameters
    ----------
    magnitudes, saliencies
        By layer, (neurons,). What is 0, negative or NaN is drawn on the lower border.
    suspects
        Layer and index of neurons to ring.
    name
        What these are called.
    xlabel, ylabel
        Of all panels.

    Returns
    -------
    Figure
        At most 25 panels; of deeper networks the layers with most suspects, then evenly spaced.
    """
    marked: dict[str, list[int]] = {}
    for layer, index in suspects:
        marked.setdefault(layer, []).append(index)
    shown = _shown(list(magnitudes), marked)
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure = canvas((PANEL[0] * max(columns, 2) + 0.3, PANEL[1] * rows + 0.5))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, layer in zip(panels.flat, shown, strict=False):
        style_axes(axes)
        x, y = (_on_log(values[layer]) for values in (magnitudes, saliencies))
        ringed = np.isin(np.arange(len(x)), marked.get(layer, []))
        axes.scatter(x[~ringed], y[~ringed], s=7, color=KEPT, alpha=0.55, linewidths=0)
        axes.scatter(x[ringed], y[ringed], s=16, color=PRUNED, linewidths=0)
        axes.scatter(
            x[ringed], y[ringed], s=42, facecolors="none", edgecolors=PRUNED, linewidths=0.9
        )
        _scale(axes, axes.xaxis, x)
        _scale(axes, axes.yaxis, y)
        axes.tick_params(labelsize=7, pad=1)
        axes.set_title(_short(layer), fontsize=8, loc="left", color=INK, pad=3)
    figure.supxlabel(xlabel, fontsize=9.5, color=MUTED)
    figure.supylabel(ylabel, fontsize=9.5, color=MUTED)
    count = sum(map(len, marked.values()))
    left_out = (
        "" if len(shown) == len(magnitudes) else f"; {len(shown)} of {len(magnitudes)} layers"
    )
    if count or left_out:
        text = f"{name}: {count:,} neurons, ringed{left_out}"
        figure.suptitle(text, fontsize=9.5, color=PRUNED, x=0.01, ha="left")
    return figure


def stats_by_layer(stats: NeuronStats, suspects: Collection[tuple[str, int]] = ()) -> Figure:
    """`by_layer` of statistics, in their own kinds of magnitude and saliency."""
    unit = "nats²" if stats.saliency == "fisher" else "nats"
    return by_layer(
        {name: getattr(layer, stats.magnitude) for name, layer in stats.layers.items()},
        {name: layer.saliency for name, layer in stats.layers.items()},
        suspects,
        xlabel=f"Magnitude ({stats.magnitude})",
        ylabel=f"Saliency ({stats.saliency}, {unit})",
    )


def by_depth(stats: NeuronStats, measure: str = "spearman") -> Array:
    """Correlation of every layer, with its interval: value, low, high, (3, layers)."""
    found = [getattr(layer.correlation, measure) for layer in stats.layers.values()]
    return np.array([[e.value for e in found], [e.low for e in found], [e.high for e in found]])


def correlation_by_depth(
    groups: Mapping[str, Sequence[Array]], ylabel: str = "Correlation (Spearman)"
) -> Figure:
    """Correlation of magnitude and saliency against depth, a colour a group of models.

    Parameters
    ----------
    groups
        By name, what `by_depth` gives for each model. One model is drawn with its interval as a
        band, several as thin lines and their mean.
    ylabel
        What is drawn.
    """
    figure, axes = single()
    axes.axhline(0, color=GRID, linewidth=1.2)
    for colour, (name, models) in zip(COLOURS, groups.items(), strict=False):
        depth = np.arange(1, models[0].shape[1] + 1)
        values = np.array([model[0] for model in models])
        if len(models) == 1:
            low, high = models[0][1:]
            axes.fill_between(depth, low, high, color=colour, alpha=0.14, linewidth=0)
        else:
            axes.plot(depth, values.T, color=colour, linewidth=0.7, alpha=0.35)
        defined = np.isfinite(values)
        mean = np.where(defined, values, 0).sum(0) / np.where(
            defined.any(0), defined.sum(0), np.nan
        )
        label = name if len(models) == 1 else f"{name} (mean of {len(models)})"
        axes.plot(depth, mean, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set(xlabel="Layer, from the input", ylabel=ylabel)
    legend(axes, ncols=min(3, max(1, len(groups))))
    return figure


def result_by_layer(result: DefenseResult) -> Figure:
    """`by_layer` of a defense's result, its pruned neurons ringed."""
    return by_layer(
        {name: layer.magnitude.numpy() for name, layer in result.neurons.items()},
        {name: layer.saliency.numpy() for name, layer in result.neurons.items()},
        [(neuron.layer, neuron.index) for neuron in result.pruned],
        name="Pruned",
        xlabel="Magnitude (l1 norm of the weights)",
        ylabel="Saliency (|Δ loss|, first order)",
    )


def result_by_depth(result: DefenseResult) -> Figure:
    """`correlation_by_depth` of a defense's result, of all neurons and of those that are kept."""
    pruned = {(neuron.layer, neuron.index) for neuron in result.pruned}
    groups: dict[str, list[Array]] = {"All neurons": [], "Kept": []}
    for name, among in zip(groups, (set(), pruned), strict=True):
        values = []
        for layer, neurons in result.neurons.items():
            kept = [i for i in range(len(neurons.mask)) if (layer, i) not in among]
            sizes, saliencies = (
                figures.double().numpy()[kept] for figures in (neurons.magnitude, neurons.saliency)
            )
            values.append(float(spearman(sizes, saliencies)) if len(kept) else np.nan)
        nothing = np.full(len(values), np.nan)
        groups[name] = [np.array([values, nothing, nothing])]
    if not pruned:
        del groups["Kept"]
    return correlation_by_depth(groups)


def roc_curves(clean: Array, attacked: Mapping[str, Array], rate: float = 0.05) -> Figure:
    """Share of attacked models flagged against share of clean ones, for every threshold.

    Parameters
    ----------
    clean
        Scores of clean models.
    attacked
        By attack, scores of attacked models; all together are drawn as well.
    rate
        A share of false alarms to mark.
    """
    figure = canvas((5.6, 4.0))
    axes = figure.subplots()
    style_axes(axes)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2)
    axes.axvline(rate, color=MUTED, linewidth=0.8, dashes=(4, 3))
    axes.text(rate + 0.012, 0.02, f"{100 * rate:g} % false alarms", color=MUTED, fontsize=8)
    for i, (attack, scores) in enumerate(attacked.items()):
        colour = ATTACK_COLOURS[i % len(ATTACK_COLOURS)]
        _roc(axes, clean, scores, attack, colour, 1.1)
    if len(attacked) > 1:
        _roc(axes, clean, np.concatenate(list(attacked.values())), "all attacks", INK, 2.2)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    axes.set(xlabel="Clean models flagged", ylabel="Attacked models flagged")
    axes.legend(
        frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right", title="AUROC",
        title_fontsize=8.5, alignment="left",
    )  # fmt: skip
    return figure


def _roc(axes: Axes, clean: Array, attacked: Array, label: str, colour: str, width: float) -> None:
    thresholds = np.unique(np.concatenate([clean, attacked, [np.inf, -np.inf]]))[::-1]
    x = (clean >= thresholds[:, None]).mean(1)
    y = (attacked >= thresholds[:, None]).mean(1)
    area = float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())
    axes.plot(x, y, color=colour, linewidth=width, label=f"{area:.2f}  {label} ({len(attacked)})")


def _shown(layers: list[str], marked: Mapping[str, list[int]]) -> list[str]:
    if len(layers) <= LAYERS:
        return layers
    spaced = [layers[i] for i in np.linspace(0, len(layers) - 1, LAYERS).round().astype(int)]
    most = sorted((layer for layer in layers if layer in marked), key=lambda x: -len(marked[x]))
    chosen = set(dict.fromkeys([*most[: LAYERS // 2], *spaced]))
    spare = [layer for layer in spaced if layer not in most[: LAYERS // 2]]
    while len(chosen) > LAYERS:
        chosen.discard(spare.pop(len(spare) // 2))
    return [layer for layer in layers if layer in chosen]


def _scale(axes: Axes, axis: Axis, values: Floats) -> None:
    """Logarithmic, unless the values lie within a decade; few ticks."""
    if values.max() < 10 * values.min():
        axis.set_major_locator(MaxNLocator(4))
        return
    set_scale = axes.set_xscale if axis is axes.xaxis else axes.set_yscale
    set_scale("log")
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(numticks=4))


def _on_log(values: Floats) -> Floats:
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    return np.maximum(values, floor([values]))


def _short(layer: str) -> str:
    return layer if len(layer) <= 24 else f"…{layer[-23:]}"
