"""The forward of networks with half of their channels or heads pruned, and after `compact`."""

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
ALL_HEADS = "all heads"


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, by what is pruned and who runs it; encoder layers of torch."""
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
    yield heads(quick)


def heads(quick: bool) -> Case:
    """Three of torch's encoder layers, as wide as those of a tiny vision transformer."""
    width, count, positions, batch = (24, 4, 5, 2) if quick else (192, 12, 197, 8)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, count, 4 * width, batch_first=True)
    x = torch.randn(batch, positions, width)
    masked = wrap(nn.TransformerEncoder(layer, 3).eval(), example_inputs=(x,), include="*out_proj")
    for mask in masks(masked).values():
        mask.data[::2] = 0
    plain, small = unwrap(masked), compact(masked, (x[:1],))
    return Case(
        f"half of {count} heads pruned, three encoder layers of width {width}, batch {batch}, "
        f"{positions} positions; torch",
        {ALL_HEADS: partial(logits, plain, x), OURS: partial(logits, small, x)},
        logits(unwrap(masked).double(), x.double()),
        limit=1e-4,
    )


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
