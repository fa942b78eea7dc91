"""Which neurons carry a backdoor, as one can tell who has the trigger: for evaluation only."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mnp_fast.stats.correlation import robust_z
from mnp_fast.wrap import masked_layers, wrap

from .population import Subject

SHARE = 0.01  # of the neurons
IMAGES = 256  # held-back ones


@torch.no_grad()
def carriers(subject: Subject) -> dict[str, list[int]]:
    """By masked layer, the neurons among the 1 % of the model that the trigger changes most.

    A neuron's trigger-activated change is the mean over images of the Euclidean distance of its
    outputs with and without the trigger (arXiv 2208.03111). Layers differ in scale, so that it is
    taken as a robust z-score in its layer.
    """
    if subject.trigger is None:
        raise ValueError("subject must be a model under attack")
    masked = wrap(subject.model, fuse=False).eval()
    images = subject.data.test[0][:IMAGES]
    before, after = (_outputs(masked, x) for x in (images, subject.trigger(images)))
    scores = {
        name: robust_z((after[name] - values).norm(dim=2).mean(0).double().numpy())
        for name, values in before.items()
    }
    order = np.sort(np.concatenate(list(scores.values())))
    least = order[-math.ceil(SHARE * len(order))]
    return {name: np.flatnonzero(values >= least).tolist() for name, values in scores.items()}


def _outputs(masked: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By masked layer, its outputs, (N, neurons, pixels)."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        kept[name] = output.reshape(*output.shape[:2], -1)

    handles = [
        layer.register_forward_hook(partial(keep, name))
        for name, layer in masked_layers(masked).items()
    ]
    masked(images)
    for handle in handles:
        handle.remove()
    return kept
