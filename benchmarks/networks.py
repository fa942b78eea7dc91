"""The network of the suites, and how plain torch masks it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from mnp_fast import frozen_weights, wrap
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.layers import MaskedBatchNorm2d, eval_affine
from mnp_fast.wrap import masked_layers

from .timing import Function, Tensors


class HandMask(nn.Module):
    """A batch norm in eval mode and its mask, folded into what plain torch does best."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(norm.weight)[:, None, None])
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.mask)


class PublicMask(MaskedBatchNorm2d):
    """A batch norm whose scale has a mask, as public code writes it."""

    def forward(self, input: Tensor) -> Tensor:
        if self.mask.dim() == 2:  # a row for each sample, as saliency asks for
            gain = (self.weight * self.mask)[..., None, None]
            return self.norm(input, None, None) * gain + self.bias[:, None, None]
        return self.norm(input, self.weight * self.mask, self.bias)

    def norm(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Batch norm with other weights."""
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.batch_norm(input, mean, var, weight, bias, self.training, momentum, self.eps)


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


def public(model: nn.Module) -> nn.Module:
    """A copy with a mask on every norm, in torch's own operators; all weights take gradients."""
    masked = wrap(model, "norm", fuse=False)
    for layer in masked_layers(masked).values():
        layer.__class__ = PublicMask
    return masked.requires_grad_(True)


def folded(model: nn.Module, mask: bool = True) -> nn.Module:
    """A copy with each norm folded into the convolution in front of it; a mask in its place."""
    model = copy.deepcopy(model)
    last = ""
    for name, module in list(model.named_modules()):
        # In this network every norm is registered right behind its convolution.
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d):
            conv = model.get_submodule(last)
            assert isinstance(conv, nn.Conv2d)
            if mask:
                scale, shift = eval_affine(module)
                conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
                conv.bias = nn.Parameter(shift)
            else:
                model.set_submodule(last, fuse_conv_bn_eval(conv, module))
            model.set_submodule(name, HandMask(module) if mask else nn.Identity())
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Only masks take gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mask"))
    return model


def channels_last(model: nn.Module) -> nn.Module:
    """The model, its convolutions' weights channels-last."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mask_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All masks of any of the networks, in order."""
    return [p for name, p in model.named_parameters() if name.endswith("mask")]


class Kept:
    """A function of a wrapped model, whose weights stay packed from call to call."""

    def __init__(self, masked: nn.Module, function: Function) -> None:
        self.function, self.frozen = function, frozen_weights(masked)
        self.frozen.__enter__()

    def __call__(self) -> Tensors:
        return self.function()
