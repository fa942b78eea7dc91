"""Which neurons are cut: an order from the fitted masks, and a rule that sees clean data only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .data import evaluate
from .result import CutPoint, LayerNeurons, PrunedNeuron
from .wrap import masks

if TYPE_CHECKING:
    from .config import DefenseConfig
    from .data import CleanSet
    from .exposure import OffsetExposure, WeightExposure

MAX_POINTS = 100
CONSPICUOUS_LIMITS = 2  # factor on `max_pruned` and `max_drop` where the suspect is conspicuous


def pruning_order(neurons: dict[str, LayerNeurons]) -> list[PrunedNeuron]:
    """All neurons, lowest mask first; among equals, largest magnitude within its layer first."""
    entries = []
    for name, layer in neurons.items():
        relative = layer.magnitude / layer.magnitude.mean().clamp(min=torch.finfo().tiny)
        values = zip(layer.mask.tolist(), relative.tolist(), strict=True)
        entries += [
            (mask, -size, PrunedNeuron(name, index, mask))
            for index, (mask, size) in enumerate(values)
        ]
    return [neuron for *_, neuron in sorted(entries, key=lambda entry: entry[:2])]


@torch.no_grad()
def prune(masked: nn.Module, neurons: Sequence[PrunedNeuron]) -> None:
    """Set the masks of these neurons to 0 and all others to 1."""
    parameters = masks(masked)
    for mask in parameters.values():
        mask.fill_(1)
    for neuron in neurons:
        parameters[neuron.layer][neuron.index] = 0


def cut_points(
    masked: nn.Module,
    order: Sequence[PrunedNeuron],
    exposure: OffsetExposure | WeightExposure,
    data: CleanSet,
    config: DefenseConfig,
    conspicuous: bool,
) -> Iterator[CutPoint]:
    """Quality on the clean set after 0, 1, 2, … neurons are cut, up to `max_pruned` or `few`.

    In larger steps where there would be more than `MAX_POINTS`. The masks are left anywhere.
    """
    share = min(1.0, config.max_pruned * _slack(conspicuous))
    last = min(len(order), max(config.few, int(share * len(order))))
    for count in range(0, last + 1, 1 + last // MAX_POINTS):
        prune(masked, order[:count])
        accuracy, loss = evaluate(masked, data)
        yield CutPoint(count, accuracy, loss, exposure.success())


def choose(
    curve: Sequence[CutPoint], images: int, config: DefenseConfig, conspicuous: bool
) -> CutPoint:
    """The smallest cut that stops the exposure within the limits, or the curve's first point.

    A backdoor is carried by few neurons. Where no cut of the curve brings the exposure's success
    down to `max_exposed` percent at an admissible loss of clean accuracy, what was exposed is
    a weakness that clean features share, and nothing is cut. A conspicuous suspect class is
    evidence of its own, so that a cut may cost more. A loss is admissible unless it exceeds
    `max_drop` by more than the standard error of a loss measured on so many images.
    """
    most = config.max_drop * _slack(conspicuous)
    for point in curve:
        drop = curve[0].accuracy - point.accuracy
        # At least this share of the answers changed; of its count, the root is the error.
        error = math.sqrt(100 * max(drop, 0.0) / images)
        if point.exposed <= config.max_exposed and drop - error <= most:
            return point
    return curve[0]


def _slack(conspicuous: bool) -> int:
    return CONSPICUOUS_LIMITS if conspicuous else 1
