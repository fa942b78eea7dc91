"""One step of the defense's two loops on a whole network.

A mask step is the forward, the gradients of all masks and their update. A suppression step is the
forward, the gradients of all weights, their clipping and their update, with norms in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast import masks, wrap
from mnp_fast.ops import mask_update_
from mnp_fast.suppression import MAX_GRADIENT_NORM

from .compiled import add_compiled, compiled
from .networks import Kept, channels_last, folded, freeze, mask_parameters, network, public
from .timing import KEPT, OURS, Case, Function, Tensors

LR, MOMENTUM, DECAY = 0.01, 0.9, 0.02
LIMIT = 5e-3  # rounding flips ReLUs near 0, in torch as here
LAST = torch.channels_last
PUBLIC = "torch, public style"
COMPILED = "torch.compile, channels-last"


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, as wide as usual and as narrow as the demo's."""
    for width, size, batch in ((8, 16, 8),) if quick else ((64, 32, 32), (16, 16, 32)):
        yield mask_step(width, size, batch, quick)
        yield suppression_step(width, size, batch, quick)


def batch_of(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, size, size) and labels."""
    torch.manual_seed(1)
    return torch.rand(batch, 3, size, size), torch.arange(batch) % 10


def mask_step(width: int, size: int, batch: int, quick: bool) -> Case:
    """Our wrapped network beside plain torch, all from the same state."""
    model = network(width)
    x, labels = batch_of(size, batch)
    case = Case(
        f"mask step, ResNet-18 width {width}, {size}x{size}, batch {batch}",
        {name: make(model, x, labels) for name, make in MASK_STEPS.items()},
        exact_mask_gradients(model, x, labels),
        limit=LIMIT,
        different=frozenset({PUBLIC}),
    )

    def compiled_step() -> Function:
        best = channels_last(freeze(folded(model)))
        return plain_step(best, compiled(best), x.to(memory_format=LAST), labels)

    add_compiled(case, f"{COMPILED}, folded", compiled_step, quick)
    return case


def public_step(model: nn.Module, x: Tensor, labels: Tensor) -> Function:
    """As research code does it: norms in train mode, all gradients, NCHW."""
    masked = public(model).train()
    return plain_step(masked, masked, x, labels)


def folded_step(model: nn.Module, x: Tensor, labels: Tensor, *, last: bool) -> Function:
    """As plain torch does it best: frozen weights, norms folded into them."""
    best = freeze(folded(model))
    if last:
        best, x = channels_last(best), x.to(memory_format=LAST)
    return plain_step(best, best, x, labels)


def our_step(model: nn.Module, x: Tensor, labels: Tensor, *, keep: bool = False) -> Function:
    """A step of the wrapped network; as `defend` does it where weights are kept packed."""
    masked = freeze(wrap(model))
    parameters = list(masks(masked).values())
    velocities = [torch.zeros_like(p) for p in parameters]
    zeros = [torch.zeros_like(p) for p in parameters]

    def step() -> Tensors:
        grads = mask_gradients(masked, x, labels)
        kept = [p.detach().clone() for p in parameters]
        data = [p.detach() for p in parameters]
        mask_update_(data, grads, velocities, zeros, lr=LR, momentum=MOMENTUM)
        restore(parameters, kept)
        return grads

    return Kept(masked, step) if keep else step


MASK_STEPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Function]] = {
    PUBLIC: public_step,
    "torch, contiguous, frozen and folded": partial(folded_step, last=False),
    "torch, channels-last, frozen and folded": partial(folded_step, last=True),
    OURS: our_step,
    KEPT: partial(our_step, keep=True),
}


def exact_mask_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensors:
    """Of all masks, in float64."""
    exact = freeze(wrap(model, fuse=False)).double()
    return mask_gradients(exact, x.double(), labels)


def mask_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensors:
    """Of the loss by the masks, (neurons,) each."""
    loss = F.cross_entropy(model(x), labels)
    return torch.autograd.grad(loss, mask_parameters(model))


def plain_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor
) -> Function:
    """A step of plain torch; weights that are not frozen get gradients as well."""
    parameters = mask_parameters(model)
    optimizer = torch.optim.SGD(parameters, LR, MOMENTUM)

    def step() -> Tensors:
        model.zero_grad()
        F.cross_entropy(forward(x), labels).backward()
        grads = tuple(p.grad.flatten() for p in parameters if p.grad is not None)
        kept = [p.detach().clone() for p in parameters]
        optimizer.step()
        with torch.no_grad():
            for parameter in parameters:
                parameter.clamp_(0, 1)
        restore(parameters, kept)
        return grads

    return step


@torch.no_grad()
def restore(parameters: list[nn.Parameter], kept: list[Tensor]) -> None:
    """Every step starts at the same masks."""
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.copy_(before)


def suppression_step(width: int, size: int, batch: int, quick: bool) -> Case:
    """Our wrapped network with all weights to fit, beside torch's training step."""
    model = network(width)
    x, labels = batch_of(size, batch)
    last, x_last = channels_last(network(width)), x.to(memory_format=LAST)
    ours = wrap(model)
    for mask in masks(ours).values():
        mask.requires_grad_(False)
    exact = network(width).double()
    case = Case(
        f"suppression step, ResNet-18 width {width}, {size}x{size}, batch {batch}",
        {
            "torch, contiguous": ascent_step(model, model, x, labels),
            "torch, channels-last": ascent_step(last, last, x_last, labels),
            OURS: ascent_step(ours, ours, x, labels),
        },
        ascent_step(exact, exact, x.double(), labels)(),
        limit=LIMIT,
    )
    add_compiled(case, COMPILED, lambda: ascent_step(last, compiled(last), x_last, labels), quick)
    return case


def ascent_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor
) -> Function:
    """A step of `mnp_fast.suppression.suppress`, at learning rate 0 to stay at the same weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, weight_decay=DECAY)

    def step() -> Tensors:
        optimizer.zero_grad()
        (-F.cross_entropy(forward(x), labels)).backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        return tuple(p.grad for p in parameters if p.grad is not None)

    return step
