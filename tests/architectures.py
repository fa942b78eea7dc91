"""Random small networks, and random masks, as strategies of hypothesis."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .models import randomize

SITES = ("auto", "neuron", "norm", "filter")
IMAGE = (3, 7, 8)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh),
    *(nn.PReLU, nn.Identity),
)
_POOLS = (
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    lambda: nn.AvgPool2d(2, ceil_mode=True),
    lambda: nn.ZeroPad2d((0, 1, 1, 0)),
    lambda: nn.Dropout2d(),
)
_UPSAMPLE = (lambda: nn.Upsample(scale_factor=2),)
# Which of several equal numbers is the largest depends on rounding, and the gradient on that.
_MAX_POOLS = (lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.MaxPool2d(2, ceil_mode=True))
_KINDS = (
    *("block", "block", "block", "pool", "again", "channels"),
    *("sum", "product", "cat", "difference"),
)


class Network(nn.Module):
    """Steps that take the latest image, some an earlier one as well, and make another.

    Attributes
    ----------
    steps
        Kind, name of the module, number of the other image.
    shapes
        (channels, height, width) of the input and of what every step makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, str, int]] = []
        self.shapes = [IMAGE]

    def add_step(self, kind: str, module: nn.Module, other: int = 0) -> None:
        """Add what is applied to the latest image, or joins an earlier one to it."""
        known = {id(child): name for name, child in self.named_children()}
        name = known.get(id(module), f"step{len(self.steps)}")
        self.add_module(name, module.eval())
        self.steps.append((kind, name, other))
        self.shapes.append(tuple(self.images(torch.zeros(1, *IMAGE))[-1].shape[1:]))

    def images(self, x: Tensor) -> list[Tensor]:
        """The input and what every step makes of it."""
        images = [x]
        for kind, name, other in self.steps:
            module, latest = getattr(self, name), images[-1]
            if kind == "apply":
                images.append(module(latest))
            elif kind == "sum":
                images.append(latest + module(images[other]))
            elif kind == "difference":
                images.append(module(images[other]) - latest)
            elif kind == "product":
                images.append(torch.sigmoid(module(images[other])) * latest)
            elif kind == "cat":
                images.append(torch.cat([module(images[other]), latest], 1))
            elif kind == "first":
                images.append(latest[:, :3])
            elif kind == "rest":
                images.append(latest[:, 2:])
            else:
                a, b = latest.chunk(2, 1)
                images.append(a * torch.tanh(b))
        return images

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.images(x)[-1]))

    def extra_repr(self) -> str:
        return f"steps={self.steps}, shapes={self.shapes}"


@st.composite
def networks(draw: Any, max_pools: bool = True) -> Network:
    """Networks in eval mode that take images of `IMAGE` and have three classes."""
    torch.manual_seed(draw(st.integers(0, 99)))
    network = Network().eval()
    for _ in range(draw(st.integers(1, 6))):
        _add_step(draw, network, max_pools)
    c, h, w = network.shapes[-1]
    if draw(st.booleans()):
        network.flatten, features = nn.Flatten(), c * h * w
    else:
        network.flatten, features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), c
    hidden = draw(st.integers(3, 8))
    norm = [nn.BatchNorm1d(hidden)] if draw(st.booleans()) else []
    network.head = nn.Sequential(
        nn.Linear(features, hidden, bias=draw(st.booleans())),
        *norm,
        draw(st.sampled_from(_ACTIVATIONS))(),
        nn.Linear(hidden, 3),
    )
    return randomize(network).double().eval()


def _add_step(draw: Any, network: Network, max_pools: bool) -> None:
    kind = draw(st.sampled_from(_KINDS))
    c, h, w = network.shapes[-1]
    other = draw(st.integers(0, len(network.shapes) - 1))
    fits = [
        network.get_submodule(name)
        for (step, name, _), before, after in zip(
            network.steps, network.shapes, network.shapes[1:], strict=False
        )
        if step == "apply" and before[0] == c == after[0]
    ]
    if kind == "pool":
        pools = [*_POOLS, *_MAX_POOLS * max_pools, *_UPSAMPLE * (h * w < 100)]
        network.add_step("apply", draw(st.sampled_from(pools))())
    elif kind == "again" and fits and min(h, w) > 2:
        network.add_step("apply", draw(st.sampled_from(fits)))
    elif kind == "channels" and c > 3:
        network.add_step(
            draw(st.sampled_from(["first", "rest", *["halves"] * (c % 2 == 0)])), nn.Identity()
        )
    elif kind in ("sum", "difference", "product", "cat"):
        shape = network.shapes[other]
        same = shape[1:] == (h, w) and (kind == "cat" or shape[0] == c)
        network.add_step(kind, nn.Identity() if same else _fitting(shape[0], c, (h, w)), other)
    else:
        network.add_step("apply", _block(draw, c, min(h, w)))


def _fitting(channels: int, wanted: int, size: tuple[int, int]) -> nn.Module:
    """What makes one image as large as another."""
    return nn.Sequential(nn.Conv2d(channels, wanted, 1), nn.AdaptiveAvgPool2d(size))


def _block(draw: Any, channels: int, size: int) -> nn.Module:
    """Convolution, norm or none, activation; now and then the norm and the activation first."""
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, channels) if channels % g == 0]))
    neurons = groups * draw(st.integers(1, max(1, 8 // groups)))
    kernel = draw(st.sampled_from([k for k in (1, 2, 3) if k <= size]))
    stride = draw(st.sampled_from([1, 1, 2]))
    if draw(st.integers(0, 5)) == 5:
        conv: nn.Module = nn.ConvTranspose2d(
            channels, neurons, kernel, stride, groups=groups, bias=draw(st.booleans())
        )
    else:
        paddings = [0, kernel // 2, *["same"] * (stride == 1)]
        modes = ["zeros", "zeros", "circular", "replicate"]
        conv = nn.Conv2d(
            channels,
            neurons,
            kernel,
            stride,
            padding=draw(st.sampled_from(paddings)),
            groups=groups,
            bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(modes)),
        )
    activation = draw(st.sampled_from(_ACTIVATIONS))()
    place = draw(st.sampled_from(["behind", "behind", "in front", "none", "group"]))
    if place == "behind":
        return nn.Sequential(conv, nn.BatchNorm2d(neurons), activation)
    if place == "in front":
        return nn.Sequential(nn.BatchNorm2d(channels), activation, conv)
    norm = [nn.GroupNorm(math.gcd(neurons, 2), neurons)] if place == "group" and neurons > 2 else []
    return nn.Sequential(conv, *norm, activation)


@st.composite
def silenced(draw: Any, masks: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Values for masks, many of them 0; of some layers all."""
    values = {}
    for name, mask in masks.items():
        allowed = draw(st.sampled_from([(0.0, 0.0, 0.3, 1.0)] * 4 + [(1.0,), (0.0,)]))
        numbers = st.lists(st.sampled_from(allowed), min_size=len(mask), max_size=len(mask))
        values[name] = torch.tensor(draw(numbers)).to(mask)
    return values
