"""All statistics of all neurons of a model, and how its magnitudes and saliencies go together."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import check_model, clean_set
from ..distributed import Processes
from ..io import atomic_path
from ..plain import finite
from ..wrap import masked_layers, wrap
from .ablation import ablation
from .correlation import (
    Array,
    deviations,
    draws,
    interval,
    kendall,
    log_pearson,
    ranks,
    resampled_means,
    robust_z,
    spearman,
)
from .magnitude import MAGNITUDES, magnitudes
from .saliency import layers_mixing_samples, sample_changes

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from torch.distributed import ProcessGroup

# What becomes of the means over samples, and of the samples before.
_SALIENCIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array], Array]]] = {
    "taylor": (lambda changes: changes, np.abs),
    "fisher": (torch.square, lambda means: means),
    "ablation": (lambda changes: changes, lambda means: means),
}
SALIENCIES = tuple(_SALIENCIES)
_MEASURES: dict[str, Callable[[Array, Array], Array]] = {
    "spearman": spearman,
    "kendall": kendall,
    "log_pearson": log_pearson,
}
FEWEST = 3  # neurons without which a layer does not count in the model's correlation


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval by bootstrap over samples; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Correlation:
    """How magnitudes and saliencies of the same neurons go together, in [-1, 1].

    Attributes
    ----------
    spearman
        Of the ranks.
    kendall
        Tau-b: pairs of neurons in the same order, less those in opposite order.
    log_pearson
        Of the logarithms of magnitude and absolute saliency; neurons with a 0 are left out.
    """

    spearman: Estimate
    kendall: Estimate
    log_pearson: Estimate


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one masked layer, float64 arrays (neurons,); see `NeuronStats.COLUMNS`."""

    l1: Array
    l2: Array
    linf: Array
    effective: Array
    spectral: Array
    saliency: Array
    magnitude_rank: Array
    saliency_rank: Array
    deviation: Array
    z: Array
    correlation: Correlation


@dataclass(frozen=True)
class NeuronStats:
    """What `mnp_fast.neuron_stats` found.

    Attributes
    ----------
    layers
        By name of the masked layer, in order of modules.
    correlation
        Of the model: the mean over layers of at least 3 neurons where it is defined.
    magnitude, saliency
        The kinds that ranks, deviations and correlations are of.
    samples
        Number of clean samples.
    """

    layers: dict[str, LayerStats]
    correlation: Correlation
    magnitude: str
    saliency: str
    samples: int

    COLUMNS = (
        "layer", "depth", "neuron", "l1", "l2", "linf", "effective", "spectral", "saliency",
        "magnitude_rank", "saliency_rank", "deviation", "z",
    )  # fmt: skip

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """One row a neuron, in the order of `COLUMNS`."""
        for depth, (name, layer) in enumerate(self.layers.items()):
            figures = [getattr(layer, column).tolist() for column in self.COLUMNS[3:]]
            for neuron, values in enumerate(zip(*figures, strict=True)):
                yield (name, depth, neuron, *values)

    def to_frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row a neuron.

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_frame needs pandas, which mnp_fast does not install by itself: "
                "pip install 'mnp_fast[pandas]'"
            ) from error
        return pd.DataFrame(list(self.rows()), columns=list(self.COLUMNS))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line a neuron, with a header; NaN is written as `nan`.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        with (
            atomic_path(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(self.COLUMNS)
            writer.writerows(self.rows())

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `content` as JSON.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        with atomic_path(path) as temporary:
            text = json.dumps(self.content(), allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """All of it as plain data, neurons by layer and column; NaN and infinity become None."""
        return {
            "magnitude": self.magnitude,
            "saliency": self.saliency,
            "samples": self.samples,
            "correlation": finite(asdict(self.correlation)),
            "layers": [
                {"layer": name, "depth": depth, **finite(asdict(layer))}
                for depth, (name, layer) in enumerate(self.layers.items())
            ],
        }


def neuron_stats(
    model: nn.Module,
    data: Any,
    saliency: str = "taylor",
    *,
    magnitude: str = "l1",
    site: str = "auto",
    batch_size: int = 256,
    bootstrap: int = 200,
    precision: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    console: Console | None = None,
    group: ProcessGroup | None = None,
) -> NeuronStats:
    """Magnitude and clean saliency of every neuron, their correlation, and who deviates.

    Parameters
    ----------
    model
        A classifier, plain or wrapped; it is not changed, and run in eval mode.
    data
        The clean set, as in `mnp_fast.defend`.
    saliency
        `"taylor"`: first-order estimate of how much the clean loss changes without the neuron,
        ``|mean_n m_k g[n, k]|``. `"fisher"`: empirical Fisher information,
        ``mean_n (m_k g[n, k])^2`` (see `mnp_fast.stats.Saliency`).
        `"ablation"`: the change itself, in nats, negative where the loss falls; exact, and slower
        (see `mnp_fast.stats.ablation`).
    magnitude
        The kind that is compared with it, as in `mnp_fast.stats.magnitudes`.
    site
        What masks multiply, as in `mnp_fast.wrap`; for a plain model.
    batch_size
        Samples of a batch of gradients, at least 1.
    bootstrap
        How often samples are drawn anew for the intervals, at least 0; without, they are NaN.
    precision, checkpoint, console
        Of ablation, as there.
    seed
        Of the bootstrap, and of the order of samples under `precision`.
    group
        Processes that share the work, as in `mnp_fast.defend`.

    Returns
    -------
    NeuronStats
        Everything about every neuron. Attention heads, and layers that mix samples, have no
        gradient of each sample: their Fisher information is NaN, and so are their intervals.

    Raises
    ------
    TypeError, ValueError
        Bad input, as `mnp_fast.defend` and `mnp_fast.wrap` say; an unknown kind; a number out of
        its range.
    ConnectionError, CheckpointError, OSError
        As in `mnp_fast.defend`.
    """
    for name, value, allowed in (
        ("saliency", saliency, SALIENCIES),
        ("magnitude", magnitude, MAGNITUDES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0, not {bootstrap}")
    if saliency != "ablation" and (precision is not None or checkpoint is not None):
        raise ValueError("precision and checkpoint are for saliency='ablation'")
    clean = replace(clean_set(data), processes=Processes(group))
    check_model(model, clean)
    if masked_layers(model):
        masked, modes = model, {module: module.training for module in model.modules()}
    else:
        masked, modes = wrap(model, site, example_inputs=(clean.images[:2],)), {}
    masked.eval()
    try:
        if saliency == "ablation":
            changes = ablation(
                masked,
                clean,
                precision=precision,
                seed=seed,
                checkpoint=checkpoint,
                console=console,
            )
            unsure = set[str]()
        else:
            changes = sample_changes(masked, clean, batch_size)
            unsure = layers_mixing_samples(masked, clean.images[:2])
        sizes = {kind: magnitudes(masked, kind) for kind in MAGNITUDES}
    finally:
        for module, training in modes.items():
            module.training = training
    return _statistics(changes, unsure, sizes, saliency, magnitude, bootstrap, seed)


def _statistics(
    changes: dict[str, Tensor],
    unsure: set[str],
    sizes: dict[str, dict[str, Tensor]],
    saliency: str,
    magnitude: str,
    bootstrap: int,
    seed: int,
) -> NeuronStats:
    of_samples, of_means = _SALIENCIES[saliency]
    samples = len(next(iter(changes.values())))
    counts = np.concatenate([np.ones((1, samples)), draws(samples, bootstrap, seed)])
    found, resampled = {}, {}
    for name, change in changes.items():
        own = {kind: _array(layers[name]) for kind, layers in sizes.items()}
        values = of_means(resampled_means(_array(of_samples(change.double())), counts))
        if name in unsure:
            values[1:] = np.nan
            if saliency == "fisher":
                values[0] = np.nan
        measures = {key: function(own[magnitude], values) for key, function in _MEASURES.items()}
        resampled[name] = measures
        deviation = deviations(own[magnitude], values[0])
        found[name] = LayerStats(
            **own,
            saliency=values[0],
            magnitude_rank=ranks(own[magnitude]),
            saliency_rank=ranks(values[0]),
            deviation=deviation,
            z=robust_z(deviation),
            correlation=Correlation(**{key: _estimate(row) for key, row in measures.items()}),
        )
    counted = [resampled[name] for name, layer in found.items() if len(layer.saliency) >= FEWEST]
    whole = {
        key: _estimate(_mean([measures[key] for measures in counted], 1 + bootstrap))
        for key in _MEASURES
    }
    return NeuronStats(found, Correlation(**whole), magnitude, saliency, samples)


def _estimate(values: Array) -> Estimate:
    """From the value itself and those of the bootstrap."""
    return Estimate(float(values[0]), *interval(values[1:]))


def _mean(rows: list[Array], length: int) -> Array:
    """Mean over layers of what is defined."""
    stacked = np.stack(rows) if rows else np.full((1, length), np.nan)
    defined = np.isfinite(stacked)
    count = defined.sum(0)
    sums = np.where(defined, stacked, 0).sum(0)
    return np.divide(sums, count, out=np.full(length, np.nan), where=count > 0)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float64).numpy()
