"""What detection looks at: gathered once from a model and a clean set, then plain data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import CleanSet
from ..exposure import OffsetExposure
from ..frozen import frozen_weights
from ..stats import magnitudes
from ..stats.changes import change_scores
from ..stats.correlation import Array, deviations, robust_z, spearman
from ..stats.saliency import sample_changes
from ..suppression import favour, favoured_classes, on_kernels, parts, suppress
from ..wrap import masks, wrap

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..config import DefenseConfig

BATCH = 256  # samples of a batch of gradients


@dataclass(frozen=True)
class Evidence:
    """What was measured on one model, without any trigger.

    Attributes
    ----------
    favours
        One row a suppression, (runs, classes): mean softmax of the classes over images of others
        once clean accuracy is gone; NaN for a class without other images.
    epochs
        Of each suppression until then.
    offset_sizes
        By class, the size of the smallest universal offset found, as root mean square in units of
        the images' range; infinite where none reaches the class.
    correlations
        By layer, Spearman's correlation of l1 magnitude and clean saliency; NaN where undefined.
    deviations
        By layer, robust z-score of each neuron's magnitude rank minus saliency rank.
    changes
        By layer, robust z-score of how far each neuron's outputs move under the suspect class's
        offset; nothing where no offset was searched for it.
    saliency
        By layer, the clean saliency, to first order, in nats.
    """

    favours: list[list[float]]
    epochs: list[int]
    offset_sizes: dict[int, float]
    correlations: dict[str, float]
    deviations: dict[str, list[float]]
    changes: dict[str, list[float]]
    saliency: dict[str, list[float]]

    def content(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Evidence:
        """The counterpart of `content`, also after JSON, whose keys are text."""
        sizes = {int(label): float(size) for label, size in content["offset_sizes"].items()}
        return cls(**{**content, "offset_sizes": sizes})


def gather(
    model: nn.Module, data: CleanSet, config: DefenseConfig, runs: int, progress: Progress
) -> Evidence:
    """Suppress the model several times, search an offset to every class, and rank its neurons.

    Parameters
    ----------
    model
        A plain classifier; it is not changed.
    data
        The clean set, checked; its processes share the work.
    config
        Its `site`, `suppress_*`, `offset_*`, `suspects` and `seed`.
    runs
        Suppressions, as `mnp_fast.suppression.parts` shares the clean set out.
    progress
        Where a bar is shown.
    """
    masked = wrap(model, config.site, example_inputs=(data.images[:2],)).eval()
    task = progress.add_task("Detecting", total=None)
    favours, epochs = [], []
    for part in parts(data, runs, config.seed):
        plain = copy.deepcopy(model).eval().requires_grad_(True)
        suppressed, images = on_kernels(plain, part)
        epochs.append(sum(1 for _ in suppress(suppressed, images, config)))
        favours.append(favour(suppressed, data))
        progress.advance(task)
    classes = list(favoured_classes(favours))[: config.suspects]
    progress.update(task, total=runs + len(classes) + 2)
    with _masks_only(masked), frozen_weights(masked):
        searched = {label: OffsetExposure(masked, data, label, config) for label in classes}
        sizes = {}
        for label, exposure in searched.items():
            sizes[label] = exposure.start()
            progress.advance(task)
        clean = _means(masked, data)
        progress.advance(task)
        changes: dict[str, Array] = {}
        suspect = searched.get(suspect_class(favours, sizes))
        if suspect is not None:
            changes = change_scores(masked, suspect.others, suspect.images())
        progress.advance(task)
    sizes_of = {name: _array(values) for name, values in magnitudes(masked).items()}
    saliency = {name: np.abs(values) for name, values in clean.items()}
    return Evidence(
        favours,
        epochs,
        sizes,
        {name: float(spearman(sizes_of[name], saliency[name])) for name in clean},
        {name: robust_z(deviations(sizes_of[name], saliency[name])).tolist() for name in clean},
        {name: values.tolist() for name, values in changes.items()},
        {name: values.tolist() for name, values in saliency.items()},
    )


def suspect_class(favours: list[list[float]], sizes: dict[int, float]) -> int:
    """The class that stands out most among its rivals, by suppression and by offset together.

    Both are taken as robust z-scores over the classes: of the mean favour, and of the negative
    logarithm of the offset's size.
    """
    mean = np.mean(np.array(favours, dtype=np.float64), axis=0)
    labels = [label for label in range(len(mean)) if math.isfinite(mean[label])]
    score = robust_z(mean[labels])
    reached = {label: size for label, size in sizes.items() if math.isfinite(size) and size > 0}
    if len(reached) > 1:
        smallness = robust_z(-np.log(list(reached.values())))
        by_label = dict(zip(reached, smallness, strict=True))
        lowest = min(by_label.values())
        score = score + np.array([by_label.get(label, lowest) for label in labels])
    return labels[int(np.argmax(score))]


def _means(masked: nn.Module, data: CleanSet) -> dict[str, Array]:
    changes = sample_changes(masked, data, BATCH)
    return {name: _array(values.double().mean(0)) for name, values in changes.items()}


def _array(values: Tensor) -> Array:
    return values.detach().to("cpu", torch.float64).numpy()


@contextmanager
def _masks_only(masked: nn.Module) -> Iterator[None]:
    """No gradients but those of masks, and at the end of none."""
    masked.requires_grad_(False)
    for mask in masks(masked).values():
        mask.requires_grad_(True)
    yield
    masked.requires_grad_(False)
