"""Exact ablation of neurons, beside loops that run the network for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast import frozen_weights, wrap
from mnp_fast.data import CleanSet
from mnp_fast.stats import ablation
from mnp_fast.wrap import masks

from .networks import channels_last, folded, freeze, mask_parameters, network, public
from .timing import OURS, Case, Tensors


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, as wide as usual and as narrow as the demo's."""
    for shape in ((8, 16, 4, 16),) if quick else ((64, 32, 16, 32), (16, 16, 64, 4)):
        yield case(*shape)


def case(width: int, size: int, samples: int, every: int) -> Case:
    """Some neurons of every layer, in proportion to its neurons."""
    model = network(width)
    x = torch.rand(samples, 3, size, size)
    data = CleanSet(x, torch.arange(samples) % 10)
    ours = freeze(wrap(model))
    neurons = {name: torch.arange(0, len(mask), every) for name, mask in masks(ours).items()}
    count = sum(map(len, neurons.values()))
    hand, apart = freeze(channels_last(folded(model))), freeze(public(model))

    def fast() -> Tensors:
        found = ablation(ours, data, batch_size=samples, neurons=neurons)
        return (torch.cat([found[name][:, chosen] for name, chosen in neurons.items()], 1),)

    def wrapped() -> Tensors:
        with frozen_weights(ours):
            return loop(ours, data, neurons)

    exact_model = freeze(wrap(model.double(), fuse=False))
    return Case(
        f"exact ablation of {count} neurons, every {every}th, ResNet-18 width {width}, "
        f"{samples} images {size}x{size}",
        {
            "torch loop, norms apart": partial(loop, apart, data, neurons),
            "torch loop, folded, channels-last": partial(loop, hand, data, neurons),
            OURS: fast,
            f"{OURS}, loop": wrapped,
        },
        loop(exact_model, CleanSet(x.double(), data.labels), neurons),
        limit=1e-4,
        heavy=True,
    )


@torch.no_grad()
def loop(model: nn.Module, data: CleanSet, neurons: dict[str, Tensor]) -> Tensors:
    """The naive way: set a mask to 0, run the network, set it back."""
    losses: Callable[[], Tensor] = partial(sample_losses, model, data)
    before, found = losses(), []
    for mask, chosen in zip(mask_parameters(model), neurons.values(), strict=True):
        for neuron in chosen:
            kept = mask[neuron].clone()
            mask[neuron] = 0
            found.append(losses() - before)
            mask[neuron] = kept
    return (torch.stack(found, 1),)


def sample_losses(model: nn.Module, data: CleanSet) -> Tensor:
    """The loss of every sample."""
    return F.cross_entropy(model(data.images).double(), data.labels, reduction="none")
