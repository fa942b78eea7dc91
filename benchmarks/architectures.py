"""Networks of four families, of any width, for images of 16×16 to 32×32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast.demo.resnet import ResNet18

STAGES = (1, 2, 4, 8)


class PreActivationBlock(nn.Module):
    """Norm and ReLU in front of each of two 3×3 convolutions (arXiv 1603.05027)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and c_in == c_out
            else nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


def preact_resnet18(width: int) -> nn.Module:
    """ResNet-18 of pre-activation blocks; `width` channels in the first stage (64 is standard)."""
    channels = [width, *(width * factor for factor in STAGES)]
    blocks = [
        block
        for index in range(4)
        for block in (
            PreActivationBlock(channels[index], channels[index + 1], 1 + (index > 0)),
            PreActivationBlock(channels[index + 1], channels[index + 1], 1),
        )
    ]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        *blocks,
        nn.BatchNorm2d(channels[-1]),
        nn.ReLU(),
        *_head(channels[-1]),
    )


def vgg_bn(width: int) -> nn.Module:
    """VGG-13 with batch norm and one linear layer (arXiv 1409.1556); 64 is the standard width.

    The last stage has as many channels as the one before; no pooling below 2×2.
    """
    layers: list[nn.Module] = []
    c_in = 3
    for index, factor in enumerate((*STAGES, 8)):
        for _ in range(2):
            c_out = width * factor
            layers += [
                nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
            c_in = c_out
        if index < 3:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(c_in))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, linear 1×1, with a shortcut where shapes allow it."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.shortcut = stride == 1 and c_in == c_out
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


# Expansion, channels in units of the stem's, blocks, stride; of arXiv 1801.04381 for small images.
MOBILE_STAGES = (
    (1, 0.5, 1, 1),
    (6, 0.75, 2, 1),
    (6, 1, 3, 2),
    (6, 2, 4, 2),
    (6, 3, 3, 1),
    (6, 5, 3, 2),
    (6, 10, 1, 1),
)


def mobilenet_v2(width: int) -> nn.Module:
    """MobileNetV2 with a stem of `width` channels (32 is standard) and stride 1."""
    blocks: list[nn.Module] = []
    c_in = width
    for expansion, factor, count, stride in MOBILE_STAGES:
        for index in range(count):
            c_out = int(width * factor)
            blocks.append(InvertedResidual(c_in, c_out, stride if index == 0 else 1, expansion))
            c_in = c_out
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *blocks,
        nn.Conv2d(c_in, 40 * width, 1, bias=False),
        nn.BatchNorm2d(40 * width),
        nn.ReLU(),
        *_head(40 * width),
    )


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": ResNet18,
    "preact-resnet18": preact_resnet18,
    "vgg13-bn": vgg_bn,
    "mobilenet-v2": mobilenet_v2,
}


def build(name: str, width: int, seed: int) -> nn.Module:
    """A network of the table with weights drawn by the seed, for ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[name](width)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
