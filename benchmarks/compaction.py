"""The forward of a network with half of its channels pruned, before and after `compact`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mnp_fast import compact, masks, unwrap, wrap

from .inference import logits
from .networks import channels_last, network
from .step import batch_of
from .timing import OURS, Case

ALL = "all channels"


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, by what is pruned and who runs it."""
    width, size, batch = (8, 16, 2) if quick else (64, 32, 32)
    x = batch_of(size, batch)[0]
    for site, streams in (("neuron", True), ("norm", True), ("neuron", False), ("norm", False)):
        masked = wrap(network(width), site)
        prune_half(masked, streams)
        plain, small = unwrap(masked), compact(masked, (x[:1],))
        exact = logits(unwrap(masked).double(), x.double())
        where = "the same of a stream" if streams else "each layer by itself"
        of_each = {ALL: operations(plain, x), OURS: operations(small, x)}

        def case(
            engine: str,
            before: Callable[[Tensor], Tensor],
            after: Callable[[Tensor], Tensor],
            x: Tensor,
            name: str = f"site {site}, {where}",
            work: dict[str, float] = of_each,
            exact: tuple[Tensor, ...] = exact,
        ) -> Case:
            return Case(
                f"half of ResNet-18 width {width} pruned, batch {batch}, {name}; {engine}",
                {ALL: partial(logits, before, x), OURS: partial(logits, after, x)},
                exact,
                limit=1e-4,
                work=work,
            )

        yield case("masked layers", masked, wrap(small), x)
        x_last = x.to(memory_format=torch.channels_last)
        yield case("torch, channels-last", channels_last(plain), channels_last(small), x_last)


def prune_half(masked: nn.Module, streams: bool) -> None:
    """Set half of every mask to 0: the same half where channels are added up, or any."""
    torch.manual_seed(0)
    halves: dict[str, Tensor] = {}
    for name, mask in masks(masked).items():
        inner = name.startswith("layers") and name.endswith("bn1")
        stream = name if inner or not streams else str(len(mask))
        half = halves.setdefault(stream, torch.randperm(len(mask))[: len(mask) // 2])
        mask.data[half] = 0


def operations(model: nn.Module, x: Tensor) -> float:
    """Floating-point operations of a forward."""
    with FlopCounterMode(display=False) as counter:
        logits(model, x)
    return counter.get_total_flops()
