"""Statistics of all neurons of a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnp_fast import wrap
from mnp_fast.stats import magnitudes
from mnp_fast.wrap import masked_layers

from . import ablation, saliency
from .networks import network
from .timing import OURS, Case, Tensors

LOOP, NORM = "torch loop, abs and sum", "torch loop, vector_norm"
COPY = "copy of the same bytes"  # read and written, as STREAM counts


def cases(quick: bool) -> Iterator[Case]:
    """Every statistic on the standard ResNet-18."""
    yield magnitude(8 if quick else 64)
    yield spectral(8 if quick else 64)
    yield from saliency.cases(quick)
    yield from ablation.cases(quick)


def magnitude(width: int) -> Case:
    """The l1 magnitude of every neuron, beside loops over layers and a copy of the same bytes."""
    masked = wrap(network(width))
    weights = [
        masked.get_parameter(f"{layer.weight_owner}.weight").detach()
        for layer in masked_layers(masked).values()
    ]
    source = torch.cat([weight.flatten() for weight in weights])
    target = torch.empty_like(source)
    size = float(source.nbytes)

    def ours() -> Tensors:
        return tuple(magnitudes(masked).values())

    def sums(weights: list[Tensor]) -> Tensors:
        return tuple(weight.abs().flatten(1).sum(1) for weight in weights)

    def norms() -> Tensors:
        return tuple(torch.linalg.vector_norm(weight, 1, (1, 2, 3)) for weight in weights)

    def copy() -> Tensors:
        return (target.copy_(source),)

    return Case(
        f"magnitudes, ResNet-18 width {width}, {size / 2**20:.1f} MiB",
        {LOOP: partial(sums, weights), NORM: norms, COPY: copy, OURS: ours},
        sums([weight.double() for weight in weights]),
        bounds=frozenset({COPY}),
        work={LOOP: size, NORM: size, COPY: 2 * size, OURS: size},
        unit="B",
    )


def spectral(width: int) -> Case:
    """Channel Lipschitz constants, beside one decomposition a channel and one a layer."""
    model = network(width)
    masked = wrap(model)
    layers = [
        (masked.get_submodule(layer.weight_owner), masked.get_submodule(name))
        for name, layer in masked_layers(masked).items()
    ]

    def filters(conv: Any, norm: Any) -> Tensor:
        scale = (norm.weight / norm.running_var.sqrt()).abs()
        weights: Tensor = (conv.weight * scale[:, None, None, None]).detach()
        return weights.flatten(2)

    def each_channel() -> Tensors:
        return tuple(
            torch.stack([torch.svd(channel)[1].max() for channel in filters(*layer)])
            for layer in layers
        )

    def each_layer() -> Tensors:
        return tuple(torch.linalg.svdvals(filters(*layer))[:, 0] for layer in layers)

    return Case(
        f"spectral norms (CLP's score), ResNet-18 width {width}",
        {
            "torch.svd, a channel each": each_channel,
            "torch svdvals, a layer each": each_layer,
            OURS: lambda: tuple(magnitudes(masked, "spectral").values()),
        },
        tuple(torch.linalg.svdvals(filters(*layer).double())[:, 0] for layer in layers),
        heavy=width >= 64,
    )
