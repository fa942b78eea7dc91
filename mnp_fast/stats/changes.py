"""How far the outputs of neurons move when images are changed."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..wrap import masked_layers
from .correlation import Array, robust_z


def change_scores(masked: nn.Module, images: Tensor, changed: Tensor) -> dict[str, Array]:
    """By masked layer, robust z-scores of how far each neuron's outputs move.

    The distance is Euclidean, its mean over samples in units of the layer's median. With triggered
    images it is the trigger-activated change (arXiv 2208.03111), layer by layer.

    Parameters
    ----------
    masked
        A wrapped model in eval mode.
    images, changed
        ``(N, *)``: the same images before and after.

    Returns
    -------
    dict of str to Array
        (neurons,) in float64; NaN for layers that the model does not call, such as the projection
        of an attention.
    """
    before, after = (_outputs(masked, given) for given in (images, changed))
    scores = {}
    for name, layer in masked_layers(masked).items():
        scores[name] = np.full(layer.neurons, np.nan)
        if name in before:
            distance = (after[name] - before[name]).norm(dim=2).mean(0).double().cpu().numpy()
            middle = max(float(np.median(distance)), np.finfo(np.float64).tiny)
            scores[name] = robust_z(distance / middle)
    return scores


@torch.no_grad()
def _outputs(masked: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By masked layer, what it gave when it was last called, (N, neurons, positions)."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        by_neuron = output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output
        kept[name] = by_neuron.reshape(*by_neuron.shape[:2], -1)

    handles = [
        layer.register_forward_hook(partial(keep, name))
        for name, layer in masked_layers(masked).items()
    ]
    try:
        masked(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept
