"""Statistics of all neurons of a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mnp_fast import wrap
from mnp_fast.stats import magnitudes
from mnp_fast.wrap import masked_layers

from . import saliency
from .networks import network
from .timing import OURS, Case, Tensors

LOOP, NORM = "torch loop, abs and sum", "torch loop, vector_norm"
COPY = "copy of the same bytes"  # read and written, as STREAM counts


def cases(quick: bool) -> Iterator[Case]:
    """Every statistic on the standard ResNet-18."""
    yield magnitude(8 if quick else 64)
    yield from saliency.cases(quick)


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
