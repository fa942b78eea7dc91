"""Neuron statistics and detections as files: figures for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .io import atomic_path, ensure_writable
from .plain import finite
from .stats_plots import by_depth, by_layer, correlation_by_depth, stats_by_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .detection import Detection
    from .stats import NeuronStats

DEVIANTS = 0.01  # share of the neurons that are marked as deviating most


def write_stats(stats: NeuronStats, folder: str | os.PathLike[str]) -> Path:
    """Write neurons.csv, neurons.json, neurons.png and correlation.png; returns the folder.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    folder = ensure_writable(folder)
    stats.to_csv(folder / "neurons.csv")
    stats.to_json(folder / "neurons.json")
    save_figure(stats_by_layer(stats, most_deviating(stats)), folder / "neurons.png")
    depth = correlation_by_depth({"this model": [by_depth(stats)]})
    save_figure(depth, folder / "correlation.png")
    return folder


def write_detection(found: Detection, folder: str | os.PathLike[str]) -> Path:
    """Write detection.json and, with the suspects, detection.png; returns the folder.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    folder = ensure_writable(folder)
    with atomic_path(folder / "detection.json") as path:
        text = json.dumps(finite(found.content()), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    if not found.suspects:
        return folder
    figure = by_layer(
        {name: np.array(found.evidence.saliency[name]) for name in found.evidence.changes},
        {name: np.array(values) for name, values in found.evidence.changes.items()},
        [(neuron.layer, neuron.index) for neuron in found.suspects],
        xlabel="Clean saliency (taylor, nats)",
        ylabel=f"Change under the offset of class {found.target_class} (z)",
    )
    save_figure(figure, folder / "detection.png")
    return folder


def most_deviating(stats: NeuronStats) -> list[tuple[str, int]]:
    """Layer and index of the 1 % of the neurons with the highest z, highest first."""
    ordered = sorted(
        (
            (-z, name, index)
            for name, layer in stats.layers.items()
            for index, z in enumerate(layer.z.tolist())
            if math.isfinite(z)
        )
    )
    return [(name, index) for _, name, index in ordered[: math.ceil(DEVIANTS * len(ordered))]]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
