"""Saliency of every neuron, per sample, beside the backward alone and beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from mnp_fast import wrap
from mnp_fast.data import CleanSet
from mnp_fast.stats import saliency

from .networks import channels_last, folded, freeze, network
from .step import mask_gradients
from .timing import OURS, Case, Tensors

ALONE = "masks' gradients alone"
PerSample = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], list[Tensor]]


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, as wide as usual and as narrow as the demo's."""
    for shape in ((8, 16, 8, 2),) if quick else ((64, 32, 32, 4), (16, 16, 32, 16)):
        yield from both(*shape)


def both(width: int, size: int, batch: int, batches: int) -> Iterator[Case]:
    """What the statistics cost beside the masks' gradients alone, and in plain torch."""
    model = network(width)
    x = torch.rand(batches * batch, 3, size, size)
    data = CleanSet(x, torch.arange(len(x)) % 10)
    ours = wrap(model)
    hand = channels_last(folded(model))
    exact_model = wrap(model.double(), fuse=False)
    for frozen in (ours, hand, exact_model):
        freeze(frozen)
    exact = all_kinds(exact_model, CleanSet(x.double(), data.labels), batch)
    name = f"ResNet-18 width {width}, {size}x{size}, {batches} batches of {batch}"

    def alone() -> Tensors:
        return sum_of_gradients(ours, data, batch)

    found = partial(all_kinds, ours, data, batch)
    # Rounding flips ReLUs near 0, in torch as here.
    yield Case(
        f"beside masks' gradients alone, {name}",
        {ALONE: alone, OURS: found},
        exact,
        limit=5e-3,
        different=frozenset({ALONE}),
    )
    yield Case(
        f"Taylor and Fisher saliency, {name}",
        {
            "torch, a row of masks each": partial(by_hand, hand, data, batch, by_rows),
            "torch, vmap of grad": partial(by_hand, hand, data, batch, by_vmap),
            OURS: found,
        },
        exact,
        limit=5e-3,
    )


def all_kinds(masked: nn.Module, data: CleanSet, batch: int) -> Tensors:
    """The statistics of all layers in a row, one tensor a kind."""
    layers = saliency(masked, data, batch).values()
    return tuple(torch.cat(kind) for kind in zip(*layers, strict=True))


def sum_of_gradients(masked: nn.Module, data: CleanSet, batch: int) -> Tensors:
    """The gradients that a mask step needs, added over the batches."""
    total: Tensors = ()
    for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        found = mask_gradients(masked, images, labels)
        total = tuple(a + b for a, b in zip(total, found, strict=True)) if total else found
    return total


def by_hand(model: nn.Module, data: CleanSet, batch: int, per_sample: PerSample) -> Tensors:
    """The same statistics of a folded network in plain torch."""
    masks = {name: p.detach() for name, p in model.named_parameters() if name.endswith("mask")}
    values = torch.cat([mask.flatten() for mask in masks.values()])
    total = torch.zeros(3, len(values))
    for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        grads = per_sample(
            model, masks, images.contiguous(memory_format=torch.channels_last), labels
        )
        changes = values * torch.cat([g.flatten(1) for g in grads], 1)
        total += torch.stack([changes.sum(0), changes.abs().sum(0), changes.square().sum(0)])
    taylor, taylor_sample, fisher = total / len(data)
    return taylor.abs(), taylor_sample, fisher


def by_rows(
    model: nn.Module, masks: dict[str, Tensor], images: Tensor, labels: Tensor
) -> list[Tensor]:
    """Masks repeated for each sample, so that their gradients are per sample."""
    rows = {
        name: mask.expand(len(labels), *mask.shape).requires_grad_() for name, mask in masks.items()
    }
    loss = F.cross_entropy(functional_call(model, rows, (images,)), labels, reduction="sum")
    return list(torch.autograd.grad(loss, list(rows.values())))


def by_vmap(
    model: nn.Module, masks: dict[str, Tensor], images: Tensor, labels: Tensor
) -> list[Tensor]:
    """The way of torch's documentation on gradients per sample."""

    def loss(masks: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, masks, (image[None],)), label[None])

    return list(vmap(grad(loss), (None, 0, 0))(masks, images, labels).values())
