"""Which neurons are cut: an order from the fitted masks, and a rule that sees clean data only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
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
CONSPICUOUS = 2  # factor on `max_pruned` and `few` where the suspect is conspicuous


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
    slack = CONSPICUOUS if conspicuous else 1
    share = min(1.0, slack * config.max_pruned)
    last = min(len(order), max(slack * config.few, int(share * len(order))))
    for count in range(0, last + 1, 1 + last // MAX_POINTS):
        prune(masked, order[:count])
        accuracy, loss = evaluate(masked, data)
        yield CutPoint(count, accuracy, loss, exposure.success())


def choose(curve: Sequence[CutPoint], images: int, config: DefenseConfig, most: float) -> CutPoint:
    """The smallest cut that stops the exposure within the limits, or the curve's first point.

    A backdoor is carried by few neurons. Where no cut of the curve brings the exposure's success
    down to `max_exposed` percent at an admissible loss of clean accuracy, `most` points, what was
    exposed is a weakness that clean features share, and nothing is cut.
    """
    for point in curve:
        if point.exposed <= config.max_exposed and admissible(curve[0], point, images, most):
            return point
    return curve[0]


def admissible(before: CutPoint, after: CutPoint, images: int, most: float) -> bool:
    """Whether a loss of accuracy exceeds `most` points by no more than its standard error."""
    drop = before.accuracy - after.accuracy
    # At least this share of the answers changed; of its count, the root is the error.
    return drop - math.sqrt(100 * max(drop, 0.0) / images) <= most


def affordable(curve: Sequence[CutPoint], config: DefenseConfig) -> CutPoint:
    """The last point of the curve before its accuracy first falls by more than `max_drop`."""
    least = curve[0].accuracy - config.max_drop
    return list(takewhile(lambda point: point.accuracy >= least, curve))[-1]
