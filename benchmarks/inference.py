"""The forward of a whole network, when nothing is fitted any more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mnp_fast import masks, unwrap, wrap

from .compiled import add_compiled, compiled
from .networks import Kept, channels_last, folded, network
from .step import batch_of
from .timing import KEPT, OURS, Case, Tensors


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, in a batch and one by one, and with more and more pruned."""
    shapes = ((8, 16, 2),) if quick else ((64, 32, 32), (64, 32, 1))
    for shape in shapes:
        yield inference(*shape, quick)
    for percent in (50,) if quick else (25, 50, 75, 90):
        yield inference(*shapes[0], quick, percent)


def inference(width: int, size: int, batch: int, quick: bool, percent: int = 0) -> Case:
    """Our wrapped network beside the unwrapped one in plain torch.

    So many percent of each layer's neurons, drawn at random, have a mask of 0.
    """
    masked, x = wrap(network(width)), batch_of(size, batch)[0]
    x_last = x.to(memory_format=torch.channels_last)
    prune(masked, percent)
    frozen, model = copy.deepcopy(masked), unwrap(masked)
    last = channels_last(copy.deepcopy(model))
    best = channels_last(folded(model, mask=False))
    exact = copy.deepcopy(model).double()
    name = f"inference, ResNet-18 width {width}, {size}x{size}, batch {batch}"
    case = Case(
        f"{name}, {percent} % pruned" if percent else name,
        {
            "torch, contiguous": partial(logits, model, x),
            "torch, channels-last": partial(logits, last, x_last),
            "torch, channels-last, folded": partial(logits, best, x_last),
            OURS: partial(logits, masked, x),
            KEPT: Kept(frozen, partial(logits, frozen, x)),
        },
        logits(exact, x.double()),
        limit=1e-4,
    )
    name = "torch.compile, channels-last, folded"
    add_compiled(case, name, lambda: partial(logits, compiled(best), x_last), quick)
    return case


@torch.no_grad()
def prune(masked: nn.Module, percent: int) -> None:
    """Set masks of a share of each layer's neurons to 0."""
    for mask in masks(masked).values():
        mask[torch.randperm(len(mask))[: len(mask) * percent // 100]] = 0


@torch.inference_mode()
def logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensors:
    """What a network makes of a batch."""
    return (model(x),)
