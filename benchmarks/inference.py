"""The forward of a whole network, when nothing is fitted any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mnp_fast import unwrap, wrap

from .compiled import add_compiled, compiled
from .networks import channels_last, folded, network
from .step import batch_of
from .timing import OURS, Case, Tensors


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, in a batch and one by one."""
    for width, size, batch in ((8, 16, 2),) if quick else ((64, 32, 32), (64, 32, 1)):
        yield inference(width, size, batch, quick)


def inference(width: int, size: int, batch: int, quick: bool) -> Case:
    """Our wrapped and unwrapped network beside the given one in plain torch."""
    model, x = network(width), batch_of(size, batch)[0]
    x_last = x.to(memory_format=torch.channels_last)
    last, best = channels_last(network(width)), channels_last(folded(model, mask=False))
    masked = wrap(model)
    exact = network(width).double()
    case = Case(
        f"inference, ResNet-18 width {width}, {size}x{size}, batch {batch}",
        {
            "torch, contiguous": partial(logits, model, x),
            "torch, channels-last": partial(logits, last, x_last),
            "torch, channels-last, folded": partial(logits, best, x_last),
            OURS: partial(logits, masked, x),
            f"{OURS}, unwrapped": partial(logits, unwrap(masked), x),
        },
        logits(exact, x.double()),
        limit=1e-4,
    )
    name = "torch.compile, channels-last, folded"
    add_compiled(case, name, lambda: partial(logits, compiled(best), x_last), quick)
    return case


@torch.inference_mode()
def logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensors:
    """What a network makes of a batch."""
    return (model(x),)
