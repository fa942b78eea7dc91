"""Single layers: convolution, norm, mask and ReLU, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast.ops import masked_conv2d
from mnp_fast.ops.conv import output_size

from .timing import OURS, Case, Tensors

LAST = torch.channels_last


@dataclass(frozen=True)
class Shape:
    """A square convolution layer of a residual network."""

    channels: int
    neurons: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" * (self.stride > 1))
        return f"{kind}, {self.channels} to {self.neurons}, {self.size}x{self.size}"


SQUARE = (Shape(64, 64, 32), Shape(128, 128, 16), Shape(256, 256, 8), Shape(512, 512, 4))
OTHERS = (
    Shape(3, 64, 32),
    Shape(64, 128, 32, stride=2),
    Shape(128, 256, 16, stride=2),
    Shape(256, 512, 8, stride=2),
    Shape(64, 128, 32, kernel=1, stride=2),
    Shape(128, 256, 16, kernel=1, stride=2),
    Shape(256, 512, 8, kernel=1, stride=2),
    Shape(256, 64, 32, kernel=1),
    Shape(64, 256, 32, kernel=1),
)


def cases(quick: bool) -> Iterator[Case]:
    """All layers at batch 32, and the square ones at 128."""
    for shape in SQUARE[:1] if quick else (*SQUARE, *OTHERS):
        yield from layer(shape, 4 if quick else 32)
    for shape in () if quick else SQUARE:
        yield from layer(shape, 128)


def layer(shape: Shape, batch: int) -> Iterator[Case]:
    """``relu(mask * (scale * conv(x) + shift) + bias)``, then the gradients of x and mask."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    x = random(batch, shape.channels, shape.size, shape.size).to(memory_format=LAST)
    weight = random(shape.neurons, shape.channels, shape.kernel, shape.kernel)
    weight /= weight[0].numel() ** 0.5
    mask, scale = random(shape.neurons).sigmoid(), random(shape.neurons).exp()
    shift, bias = random(shape.neurons), random(shape.neurons)
    geometry = (shape.stride,) * 2, (shape.padding,) * 2, (1, 1)
    grad = random(*output_size(x.shape, weight.shape, *geometry)).to(memory_format=LAST)
    options: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding}

    def by_hand(x: Tensor, weight: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Y and t in plain torch, the scale folded into the weight."""
        mask, scale, shift, bias = (v.to(x.dtype) for v in vectors)
        t = F.conv2d(x, weight * scale[:, None, None, None], shift, **options)
        return (mask[:, None, None] * t + bias[:, None, None]).relu(), t

    vectors = mask, scale, shift, bias
    exact, exact_t = by_hand(x.double(), weight.double(), *vectors)
    whole = (weight * (mask * scale)[:, None, None, None]).contiguous(memory_format=LAST)
    offset = mask * shift + bias
    packed = weight.contiguous(memory_format=LAST)

    def ours(algorithm: str) -> Tensors:
        given: dict[str, Any] = {**options, "algorithm": algorithm}
        return (masked_conv2d(x, weight, *vectors, activation="relu", **given),)

    def folded() -> Tensors:
        return (F.conv2d(x, whole, offset, **options).relu_(),)

    def apart() -> Tensors:
        u = F.conv2d(x, packed, **options)
        return (u.mul_((mask * scale)[:, None, None]).add_(offset[:, None, None]).relu_(),)

    algorithms = ["auto", "direct"] if shape.kernel == 3 and shape.stride == 1 else ["auto"]
    with torch.no_grad():
        yield Case(
            f"{shape}, batch {batch}, forward",
            {
                "torch, all folded": folded,
                "torch, apart": apart,
                **{f"{OURS} {name}": partial(ours, name) for name in algorithms},
            },
            (exact,),
        )

    y, t = (v.float().contiguous(memory_format=LAST) for v in (exact, exact_t))
    u = F.conv2d(x, packed, **options)
    gain = (mask * scale)[:, None, None]

    def gradients(dy: Tensor, x: Tensor, w: Tensor, y: Tensor, t: Tensor, gain: Tensor) -> Tensors:
        dz = dy * (y > 0)
        dx = torch.ops.aten.convolution_backward(
            dz * gain, x, w, None, *map(list, geometry), False, [0, 0], 1, [True, False, False]
        )[0]
        return (dz * t).sum((0, 2, 3)), dx

    def fused(algorithm: str) -> Tensors:
        needs = (True, False, False, True)
        dx, _, _, sums = torch.ops.mnp_fast.masked_conv2d_backward(
            grad, x, weight, y, u, mask, scale, shift, *geometry, 1, *needs, algorithm
        )
        return sums[1].sum(0), dx

    with torch.no_grad():
        exact_gain = gain.double()
        yield Case(
            f"{shape}, batch {batch}, backward",
            {
                "torch": lambda: gradients(grad, x, packed, y, t, gain),
                **{f"{OURS} {name}": partial(fused, name) for name in algorithms},
            },
            gradients(grad.double(), x.double(), weight.double(), exact, exact_t, exact_gain),
        )
