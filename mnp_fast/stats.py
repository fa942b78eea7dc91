"""Per-neuron statistics of a wrapped model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import CleanSet
from .ops import neuron_magnitude
from .wrap import masked_layers, masks


def magnitudes(masked: nn.Module, norm: str = "l1") -> dict[str, Tensor]:
    """Norm of each neuron's weights, (neurons,), by name of its masked layer.

    A batch norm's neurons are the filters of the convolution in front; where there is none, the
    magnitude is that of its scale (1 without one).
    """
    layers = masked_layers(masked)
    weights = []
    for layer in layers.values():
        owner = masked.get_submodule(layer.weight_owner) if layer.weight_owner else layer
        weight = getattr(owner, "weight", None)
        weights.append(torch.ones_like(layer.mask) if weight is None else weight)
    return dict(zip(layers, neuron_magnitude(weights, norm), strict=True))


def taylor_saliency(masked: nn.Module, data: CleanSet, batch_size: int) -> dict[str, Tensor]:
    """First-order estimate of how much the clean loss changes when a neuron's mask goes to 0.

    ``|mask * d loss / d mask|`` with the mean cross-entropy over `data`, (neurons,) by name of
    the masked layer, for the model in its present mode.
    """
    parameters = masks(masked)
    totals = {name: torch.zeros_like(mask) for name, mask in parameters.items()}
    for images, labels in zip(
        data.images.split(batch_size), data.labels.split(batch_size), strict=True
    ):
        loss = F.cross_entropy(masked(images), labels, reduction="sum") / len(data)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for total, grad in zip(totals.values(), grads, strict=True):
            total += grad
    return {name: (parameters[name].detach() * total).abs() for name, total in totals.items()}
