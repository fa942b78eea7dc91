"""A mask step of a whole network: forward, gradients of all masks, update."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast import masks, wrap
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.layers import eval_affine
from mnp_fast.ops import mask_update_

from .timing import OURS, Case, Function, Tensors

LR, MOMENTUM = 0.01, 0.9
LAST = torch.channels_last


def cases(quick: bool) -> Iterator[Case]:
    """ResNet-18 for small images, as wide as usual and as narrow as the demo's."""
    for width, size, batch in ((8, 16, 8),) if quick else ((64, 32, 32), (16, 16, 32)):
        yield mask_step(width, size, batch)


class HandMask(nn.Module):
    """A batch norm in eval mode and its mask, folded into what plain torch does best."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(norm.weight)[:, None, None])
        self.bias = norm.bias.detach()[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.mask)


class PublicMask(nn.BatchNorm2d):
    """A batch norm whose scale has a mask, as public code writes it."""

    mask: nn.Parameter

    @classmethod
    def adopt(cls, norm: nn.BatchNorm2d) -> None:
        """Turn a plain batch norm into one of these, in place."""
        norm.__class__ = cls
        norm.mask = nn.Parameter(torch.ones_like(norm.weight))

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight * self.mask,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )


def network(width: int) -> nn.Module:
    """With statistics and weights that are not 1 and 0."""
    torch.manual_seed(0)
    model = ResNet18(width).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            nn.init.normal_(mean, std=0.1)
            nn.init.uniform_(variance, 0.5, 2)
    return model


def folded(model: nn.Module) -> nn.Module:
    """Frozen, each norm's scale and shift folded into the convolution in front of it."""
    model = copy.deepcopy(model)
    last = None
    for name, module in list(model.named_modules()):
        # In this network every norm is registered right behind its convolution.
        if isinstance(module, nn.Conv2d):
            last = module
        elif isinstance(module, nn.BatchNorm2d):
            assert last is not None
            scale, shift = eval_affine(module)
            last.weight = nn.Parameter(last.weight * scale[:, None, None, None])
            last.bias = nn.Parameter(shift)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, HandMask(module))
    return model


def mask_step(width: int, size: int, batch: int) -> Case:
    """Our wrapped network beside plain torch, all from the same state."""
    model = network(width)
    x, labels = torch.rand(batch, 3, size, size), torch.arange(batch) % 10
    ours = wrap(model)
    public = copy.deepcopy(model).train()
    for module in list(public.modules()):
        if isinstance(module, nn.BatchNorm2d):
            PublicMask.adopt(module)
    best: nn.Module = folded(model).to(memory_format=LAST)  # type: ignore[call-overload]
    exact = wrap(model.double(), fuse=False)
    for frozen in (ours, best, exact):
        freeze(frozen)
    return Case(
        f"mask step, ResNet-18 width {width}, {size}x{size}, batch {batch}",
        {
            "torch, public style": plain_step(public, x, labels),
            "torch, frozen and folded": plain_step(best, x.to(memory_format=LAST), labels),
            OURS: our_step(ours, x, labels),
        },
        gradients(exact, x.double(), labels),
        limit=5e-3,  # rounding flips ReLUs near 0, in torch as here
        different=frozenset({"torch, public style"}),
    )


def freeze(model: nn.Module) -> None:
    """Only masks take gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mask"))


def mask_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All masks of any of the networks, in order."""
    return [p for name, p in model.named_parameters() if name.endswith("mask")]


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensors:
    """Of the loss by the masks, (neurons,) each."""
    loss = F.cross_entropy(model(x), labels)
    grads = torch.autograd.grad(loss, mask_parameters(model))
    return tuple(grad.flatten() for grad in grads)


def plain_step(model: nn.Module, x: Tensor, labels: Tensor) -> Function:
    """A step of plain torch; weights that are not frozen get gradients as well."""
    parameters = mask_parameters(model)
    optimizer = torch.optim.SGD(parameters, LR, MOMENTUM)

    def step() -> Tensors:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        grads = tuple(p.grad.flatten() for p in parameters if p.grad is not None)
        kept = [p.detach().clone() for p in parameters]
        optimizer.step()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.clamp_(0, 1)
                parameter.copy_(before)  # every step starts at the same masks
        return grads

    return step


def our_step(model: nn.Module, x: Tensor, labels: Tensor) -> Function:
    """A step of the wrapped network."""
    parameters = list(masks(model).values())
    velocities = [torch.zeros_like(p) for p in parameters]
    zeros = [torch.zeros_like(p) for p in parameters]

    def step() -> Tensors:
        grads = gradients(model, x, labels)
        kept = [p.detach().clone() for p in parameters]
        data = [p.detach() for p in parameters]
        mask_update_(data, grads, velocities, zeros, lr=LR, momentum=MOMENTUM)
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
        return grads

    return step
