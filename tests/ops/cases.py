"""Inputs that the operator tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

VECTORS = ("mask", "scale", "shift", "bias")


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> dict[str, object]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


CONVS = {
    "3x3": Conv(2, 8, 8, 8, 16),
    "odd": Conv(3, 3, 7, 9, 5),
    "wide": Conv(1, 33, 5, 5, 70),
    "stride2": Conv(2, 6, 9, 10, 7, stride=(2, 2)),
    "uneven": Conv(2, 4, 11, 8, 6, kernel=(5, 2), stride=(3, 1), padding=(0, 2), dilation=(1, 2)),
    "dilated": Conv(2, 4, 9, 9, 4, stride=(2, 3), padding=(4, 4), dilation=(2, 2)),
    "1x1": Conv(2, 9, 6, 5, 11, kernel=(1, 1), padding=(0, 0)),
    "1x1, one pixel": Conv(9, 20, 1, 1, 35, kernel=(1, 1), padding=(0, 0)),
    "1x1, long sums": Conv(3, 2100, 3, 5, 35, kernel=(1, 1), padding=(0, 0)),
    "1x1 stride2": Conv(2, 5, 6, 5, 4, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    "kernel below stride": Conv(2, 3, 8, 8, 4, kernel=(2, 2), stride=(3, 3), padding=(0, 0)),
    "grouped": Conv(2, 12, 6, 6, 9, groups=3),
    "depthwise": Conv(2, 6, 7, 7, 12, stride=(2, 1), groups=6),
    "depthwise 3x3": Conv(2, 37, 6, 7, 37, groups=37),
    "depthwise 3x3, wide padding": Conv(1, 20, 4, 3, 20, padding=(1, 3), groups=20),
    "depthwise 3x3, one column": Conv(3, 16, 5, 1, 16, groups=16),
    "depthwise 3x3, many rows": Conv(2, 35, 23, 9, 35, padding=(0, 1), groups=35),
    "depthwise 3x3, stride 2": Conv(2, 37, 19, 12, 37, stride=(2, 2), groups=37),
    "depthwise 5x5": Conv(2, 35, 11, 8, 35, kernel=(5, 5), padding=(2, 1), groups=35),
    "depthwise 5x5, stride 2": Conv(
        2, 18, 10, 13, 18, kernel=(5, 5), stride=(2, 2), padding=(3, 2), groups=18
    ),
    "depthwise 7x7": Conv(2, 33, 5, 11, 33, kernel=(7, 7), padding=(3, 3), groups=33),
    "depthwise 7x7, stride 2": Conv(
        1, 16, 14, 7, 16, kernel=(7, 7), stride=(2, 2), padding=(3, 3), groups=16
    ),
    "depthwise 3x3, even padding": Conv(3, 16, 16, 7, 16, stride=(2, 2), padding=(2, 0), groups=16),
    "image": Conv(2, 3, 12, 11, 21, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    "image, dilated rows": Conv(2, 2, 12, 9, 5, stride=(1, 2), padding=(2, 0), dilation=(3, 1)),
    "image, dilated columns": Conv(2, 1, 9, 14, 5, padding=(2, 3), dilation=(1, 3)),
    "image, long sums": Conv(1, 15, 12, 13, 18, kernel=(9, 9), padding=(2, 3)),
    "image, many columns": Conv(1, 3, 3, 130, 6, kernel=(2, 7), padding=(0, 1)),
    "groups of 4": Conv(2, 24, 7, 7, 24, groups=6),
    "groups of 2, 1x1 stride 3": Conv(
        2, 10, 7, 8, 10, kernel=(1, 1), stride=(3, 2), padding=(0, 0), groups=5
    ),
    "groups of 2, one column": Conv(3, 38, 9, 1, 38, groups=19),
    "groups of 8, stride 2": Conv(2, 40, 11, 15, 40, stride=(2, 2), groups=5),
    "groups of 8, wide padding": Conv(1, 24, 2, 5, 24, padding=(3, 4), groups=3),
    "groups of 4, 2x2": Conv(2, 20, 6, 7, 20, kernel=(2, 2), padding=(1, 0), groups=5),
    "groups of 16 to 24, stride 2": Conv(2, 48, 7, 10, 72, stride=(2, 2), groups=3),
    "groups of 33, wide image": Conv(1, 66, 5, 90, 66, groups=2),
    "groups of 120": Conv(1, 240, 4, 5, 16, padding=(0, 1), groups=2),
    "groups of 4 to 8": Conv(2, 12, 6, 5, 24, groups=3),
    "groups of 16": Conv(2, 48, 5, 4, 48, groups=3),
    "groups of 8, 4 in": Conv(1, 12, 6, 5, 24, groups=3),
    "mostly padding": Conv(3, 17, 3, 2, 18, kernel=(5, 5), padding=(2, 2)),
    "81 kinds of pixels": Conv(1, 16, 9, 9, 3, kernel=(9, 9), padding=(4, 4)),
    "one pixel": Conv(4, 5, 1, 1, 3, kernel=(1, 1), padding=(0, 0)),
    "no samples": Conv(0, 3, 5, 5, 4),
}


def random_mask(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Masks in [0, 1], about a third of them exactly 0."""
    return torch.rand(*shape, dtype=dtype) * (torch.rand(*shape) > 0.35)


def conv_inputs(
    conv: Conv, dtype: torch.dtype = torch.float64, per_sample: bool = False
) -> dict[str, Tensor]:
    """Random tensors for every argument of masked_conv2d."""
    x = torch.randn(conv.n, conv.c, conv.h, conv.w, dtype=dtype)
    weight = torch.randn(conv.k, conv.c // conv.groups, *conv.kernel, dtype=dtype)
    u = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    mask_shape = (conv.n, conv.k) if per_sample else (conv.k,)
    return {
        "x": x,
        "weight": weight,
        "mask": random_mask(*mask_shape, dtype=dtype),
        "scale": torch.randn(conv.k, dtype=dtype),
        "shift": torch.randn(conv.k, dtype=dtype),
        "bias": torch.randn(conv.k, dtype=dtype),
        "residual": torch.randn_like(u),
    }


def require_grad(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Leaf copies that ask for gradients, in the same memory layout."""
    return {
        name: None if t is None else t.detach().clone().requires_grad_()
        for name, t in inputs.items()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    expected = expected.double()
    norm = expected.norm().item()
    return (actual.double() - expected).norm().item() / (norm if norm else 1.0)


def assert_same_grads(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float
) -> None:
    """Gradients of two sets of leaves agree."""
    for name, leaf in expected.items():
        if leaf is None:
            continue
        assert leaf.grad is not None, name
        mine = actual[name]
        assert mine is not None
        assert mine.grad is not None, name
        assert mine.grad.shape == leaf.grad.shape, name
        assert mine.grad.dtype == mine.dtype, name
        assert relative_error(mine.grad, leaf.grad) <= tolerance, name


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(compute: Callable[[], tuple[Tensor, ...]], counts: tuple[int, ...]) -> None:
    """The results must not depend on the number of threads."""
    results = []
    for count in counts:
        with torch_threads(count):
            results.append(compute())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
