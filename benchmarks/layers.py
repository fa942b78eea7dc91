"""Single layers: convolution, norm, mask and ReLU, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast.ops import masked_conv2d
from mnp_fast.ops.conv import output_size

from .compiled import add_compiled, compiled
from .timing import OURS, Case, Function, Tensors

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
    if quick:
        yield from Layer(Shape(16, 16, 8), 16).cases(quick)
        return
    for shape in (*SQUARE, *OTHERS):
        yield from Layer(shape, 32).cases(quick)
    for shape in SQUARE:
        yield from Layer(shape, 128).cases(quick)


@contextmanager
def no_onednn() -> Iterator[None]:
    """What torch runs when oneDNN is off."""
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(True)


class Layer:
    """``relu(mask * (scale * conv(x) + shift) + bias)``, and its gradients by x and mask."""

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape, self.name = shape, f"{shape}, batch {batch}"
        self.generator = torch.Generator().manual_seed(0)
        self.x = self.random(batch, shape.channels, shape.size, shape.size)
        weight = self.random(shape.neurons, shape.channels, shape.kernel, shape.kernel)
        self.weight = weight / weight[0].numel() ** 0.5
        self.mask = self.random(shape.neurons).sigmoid()
        self.scale = self.random(shape.neurons).exp()
        self.shift, self.bias = self.random(shape.neurons), self.random(shape.neurons)
        self.geometry = (shape.stride,) * 2, (shape.padding,) * 2, (1, 1)
        self.options: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding}
        self.grad = self.random(*output_size(self.x.shape, self.weight.shape, *self.geometry))
        self.operations = 2 * self.grad.numel() * self.weight[0].numel()
        is_square = shape.kernel == 3 and shape.stride == 1
        self.algorithms = ("auto", "winograd2", "direct") if is_square else ("auto",)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator)

    @torch.no_grad()
    def cases(self, quick: bool) -> Iterator[Case]:
        exact_t = self.exact_t()
        exact = (self.mask[:, None, None] * exact_t + self.bias[:, None, None]).relu()
        yield self.forward(exact)
        yield self.backward(exact, exact_t, quick)

    def exact_t(self) -> Tensor:
        """What is masked, in float64; the scale is folded into the weight."""
        weight = self.weight.double() * self.scale.double()[:, None, None, None]
        return F.conv2d(self.x.double(), weight, self.shift.double(), **self.options)

    def forward(self, exact: Tensor) -> Case:
        """Plain torch has norm and mask folded into the weight, or apart behind it."""
        gain = (self.mask * self.scale)[:, None, None]
        whole, offset = self.weight * gain[..., None], self.mask * self.shift + self.bias
        x, options = self.x.contiguous(memory_format=LAST), self.options
        packed, packed_whole = (w.contiguous(memory_format=LAST) for w in (self.weight, whole))
        vectors = self.mask, self.scale, self.shift, self.bias

        def fold(x: Tensor, weight: Tensor) -> Tensors:
            return (F.conv2d(x, weight, offset, **options).relu_(),)

        def apart(x: Tensor, weight: Tensor) -> Tensors:
            u = F.conv2d(x, weight, **options)
            return (u.mul_(gain).add_(offset[:, None, None]).relu_(),)

        def ours(algorithm: str) -> Tensors:
            given: dict[str, Any] = {**options, "algorithm": algorithm}
            return (masked_conv2d(x, self.weight, *vectors, activation="relu", **given),)

        case = Case(
            f"{self.name}, forward",
            {
                "torch, contiguous, folded": partial(fold, self.x, whole),
                "torch, contiguous, apart": partial(apart, self.x, self.weight),
                "torch, channels-last, folded": partial(fold, x, packed_whole),
                "torch, channels-last, apart": partial(apart, x, packed),
            },
            (exact,),
        )
        self.add_nnpack(case, partial(fold, self.x, whole), whole)
        add_compiled(
            case,
            "torch.compile, channels-last, folded",
            lambda: partial(compiled(fold), x, packed_whole),
        )
        return self.with_ours(case, ours)

    def add_nnpack(self, case: Case, function: Function, weight: Tensor) -> None:
        """What torch runs without oneDNN, where that is NNPACK."""

        def without() -> Tensors:
            with no_onednn():
                return function()

        with no_onednn():
            chosen = torch._C._select_conv_backend(
                self.x, weight, None, *self.geometry, False, (0, 0), 1
            )
        if chosen.name.startswith("Nnpack"):
            case.functions["NNPACK, contiguous, folded"] = without
        else:
            case.excluded["NNPACK"] = f"torch runs {chosen.name} here instead"

    def backward(self, exact: Tensor, exact_t: Tensor, quick: bool) -> Case:
        """Gradients of x and mask, from what a forward keeps. NNPACK has none in torch."""
        gain = (self.mask * self.scale)[:, None, None]
        plain = [self.grad, self.x, self.weight, exact.float(), exact_t.float()]
        last = [tensor.contiguous(memory_format=LAST) for tensor in plain]
        grad, x, packed, y, _ = last
        u = F.conv2d(x, packed, **self.options)
        geometry = self.geometry

        def torch_grads(
            gain: Tensor, dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, t: Tensor
        ) -> Tensors:
            dz = dy * (y > 0)
            dx = torch.ops.aten.convolution_backward(
                dz * gain,
                x,
                weight,
                None,
                *map(list, geometry),
                False,
                [0, 0],
                1,
                [True, False, False],
            )[0]
            return (dz * t).sum((0, 2, 3)), dx

        def ours(algorithm: str) -> Tensors:
            vectors, needs = (self.mask, self.scale, self.shift), (True, False, False, True)
            dx, _, _, sums = torch.ops.mnp_fast.masked_conv2d_backward(
                grad, x, self.weight, y, u, *vectors, *geometry, 1, *needs, algorithm
            )
            return sums[1].sum(0), dx

        doubles = [v.double() for v in (gain, self.grad, self.x, self.weight, exact, exact_t)]
        case = Case(
            f"{self.name}, backward",
            {
                "torch, contiguous": partial(torch_grads, gain, *plain),
                "torch, channels-last": partial(torch_grads, gain, *last),
            },
            torch_grads(*doubles),
        )
        name = "torch.compile, channels-last"
        add_compiled(case, name, lambda: partial(compiled(torch_grads), gain, *last), quick)
        return self.with_ours(case, ours)

    def with_ours(self, case: Case, ours: Callable[[str], Tensors]) -> Case:
        """The case with a competitor an algorithm, and the operations of all."""
        for algorithm in self.algorithms:
            case.functions[f"{OURS} {algorithm}"] = partial(ours, algorithm)
        case.work = dict.fromkeys(case.functions, float(self.operations))
        return case
