"""Single layers: convolution, norm, mask and ReLU, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast import frozen_weights
from mnp_fast.ops import masked_conv2d, masked_linear
from mnp_fast.ops.conv import output_size
from mnp_fast.ops.linear import as_image, kernel_wins

from .compiled import add_compiled, compiled
from .timing import OURS, Case, Function, Tensors

LAST = torch.channels_last


@dataclass(frozen=True)
class Shape:
    """A convolution layer with a square kernel and a square image."""

    channels: int
    neurons: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2 * self.dilation

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" * (self.stride > 1))
        kind += f" dilation {self.dilation}" * (self.dilation > 1)
        if self.groups > 1:
            kind += " depthwise" if self.groups == self.channels else f" in {self.groups} groups"
        return f"{kind}, {self.channels} to {self.neurons}, {self.size}x{self.size}"


class Way(NamedTuple):
    """How this project computes a layer."""

    algorithm: str
    weight: Tensor


SQUARE = (Shape(64, 64, 32), Shape(128, 128, 16), Shape(256, 256, 8), Shape(512, 512, 4))
OTHERS = (
    Shape(3, 64, 32),
    Shape(1, 32, 28, kernel=5),
    Shape(256, 256, 6),
    Shape(128, 128, 2),
    Shape(64, 128, 32, stride=2),
    Shape(128, 256, 16, stride=2),
    Shape(256, 512, 8, stride=2),
    Shape(128, 256, 28, stride=2),
    Shape(64, 128, 32, kernel=1, stride=2),
    Shape(128, 256, 16, kernel=1, stride=2),
    Shape(256, 512, 8, kernel=1, stride=2),
    Shape(256, 64, 32, kernel=1),
    Shape(64, 256, 32, kernel=1),
    Shape(64, 64, 16, kernel=5),
    Shape(64, 64, 32, dilation=2),
    Shape(64, 64, 32, groups=16),
    Shape(128, 128, 32, groups=32),
    Shape(256, 256, 16, groups=32),
    Shape(512, 512, 8, groups=32),
    Shape(256, 256, 16, stride=2, groups=32),
    Shape(128, 128, 32, groups=128),
    Shape(256, 256, 16, stride=2, groups=256),
    Shape(240, 240, 28, kernel=5, groups=240),
    Shape(384, 384, 14, kernel=7, groups=384),
)
STEM = Shape(3, 64, 224, kernel=7, stride=2)


def cases(quick: bool) -> Iterator[Case]:
    """All layers at batch 32, the square ones at 128 too, and a network's two ends."""
    if quick:
        yield from Layer(Shape(16, 16, 8), 16).cases(quick)
        return
    for shape in (*SQUARE, *OTHERS):
        yield from Layer(shape, 32).cases(quick)
    for shape in SQUARE:
        yield from Layer(shape, 128).cases(quick)
    yield from Layer(STEM, 4).cases(quick)
    for linear in (Linear(512, 1000, 128), Linear(384, 1536, 2048)):
        yield from linear.cases(quick)


@contextmanager
def no_onednn() -> Iterator[None]:
    """What torch runs when oneDNN is off."""
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(True)


def in_layout(tensors: Tensors, layout: torch.memory_format) -> Tensors:
    """The tensors in float32, in a memory format."""
    return tuple(tensor.float().contiguous(memory_format=layout) for tensor in tensors)


class Layer:
    """``relu(mask * (scale * conv(x) + shift) + bias)``; gradients by x and mask, and by weight."""

    convolves = True

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape, self.name = shape, f"{shape}, batch {batch}"
        self.generator = torch.Generator().manual_seed(0)
        self.x = self.random(batch, shape.channels, shape.size, shape.size)
        depth = shape.channels // shape.groups
        weight = self.random(shape.neurons, depth, shape.kernel, shape.kernel)
        self.weight = weight / weight[0].numel() ** 0.5
        self.mask = self.random(shape.neurons).sigmoid()
        self.scale = self.random(shape.neurons).exp()
        self.shift, self.bias = self.random(shape.neurons), self.random(shape.neurons)
        self.geometry = (shape.stride,) * 2, (shape.padding,) * 2, (shape.dilation,) * 2
        self.options: dict[str, Any] = {
            "stride": shape.stride,
            "padding": shape.padding,
            "dilation": shape.dilation,
            "groups": shape.groups,
        }
        self.grad = self.random(*output_size(self.x.shape, self.weight.shape, *self.geometry))
        self.operations = 2 * self.grad.numel() * self.weight[0].numel()
        is_square = shape.kernel == 3 and shape.stride == 1 and shape.groups == 1
        names = ("auto", "winograd2", "direct") if is_square else ("auto",)
        self.ways = {name: Way(name, self.weight) for name in names}
        self.kept = nn.Conv2d(1, 1, 1)
        self.kept.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        self.ways["auto, frozen weights"] = Way("auto", self.kept.weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What torch does forward."""
        return F.conv2d(x, weight, bias, **self.options)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """What torch does backward."""
        return self.grads(grad, x, weight, [True, False, False])[0]

    def grads(
        self, grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
    ) -> tuple[Tensor, ...]:
        """Torch's gradients of input, weight and bias, as far as they are needed."""
        geometry, groups = map(list, self.geometry), self.shape.groups
        made: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, False, [0, 0], groups, needed
        )
        return made

    def masked(self, x: Tensor, vectors: Tensors, way: Way) -> Tensor:
        """What this project does forward, given mask, scale, shift and bias."""
        given: dict[str, Any] = {**self.options, "algorithm": way.algorithm}
        return masked_conv2d(x, way.weight, *vectors, activation="relu", **given)

    def masked_grads(
        self, grad: Tensor, x: Tensor, y: Tensor, u: Tensor, vectors: Tensors, way: Way
    ) -> tuple[Tensor, Tensor]:
        """What this project does backward: sums a sample and neuron, and the gradient of x."""
        geometry, needs = (*self.geometry, self.shape.groups), (True, False, False, True)
        dx, _, _, sums = torch.ops.mnp_fast.masked_conv2d_backward(
            grad, x, way.weight, y, u, *vectors, *geometry, *needs, way.algorithm
        )
        return sums, dx

    def as_kept(self, image: Tensor) -> Tensor:
        """An image as this project's forward keeps it for the backward."""
        return image

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator)

    @torch.no_grad()
    def cases(self, quick: bool) -> Iterator[Case]:
        exact_t = self.exact_t()
        exact = (self.mask[:, None, None] * exact_t + self.bias[:, None, None]).relu()
        with frozen_weights(self.kept):
            yield self.forward(exact)
            yield self.backward(exact, exact_t, quick)
        if self.convolves:
            yield self.weight_gradient(exact, quick)
            yield self.forward(exact, contiguous=True)

    def exact_t(self) -> Tensor:
        """What is masked, in float64; the scale is folded into the weight."""
        weight = self.weight.double() * self.scale.double()[:, None, None, None]
        return self.convolve(self.x.double(), weight, self.shift.double())

    def forward(self, exact: Tensor, *, contiguous: bool = False) -> Case:
        """Plain torch has norm and mask folded into the weight, or apart behind it.

        Where images are `contiguous`, torch computes them as they are, and is not compiled.
        """
        gain = (self.mask * self.scale)[:, None, None]
        whole, offset = self.weight * gain[..., None], self.mask * self.shift + self.bias
        x = self.x.to(memory_format=LAST)
        packed, packed_whole = (w.contiguous(memory_format=LAST) for w in (self.weight, whole))
        vectors = self.mask, self.scale, self.shift, self.bias

        def fold(x: Tensor, weight: Tensor) -> Tensors:
            return (self.convolve(x, weight, offset).relu_(),)

        def apart(x: Tensor, weight: Tensor) -> Tensors:
            u = self.convolve(x, weight)
            return (u.mul_(gain).add_(offset[:, None, None]).relu_(),)

        def ours(way: Way) -> Tensors:
            return (self.masked(self.x if contiguous else x, vectors, way),)

        case = Case(
            f"{self.name}, forward" + ", contiguous images" * contiguous,
            {
                "torch, contiguous, folded": partial(fold, self.x, whole),
                "torch, contiguous, apart": partial(apart, self.x, self.weight),
            },
            (exact,),
        )
        self.add_nnpack(case, partial(fold, self.x, whole), whole)
        if contiguous:
            return self.with_ours(case, ours, frozen=False)
        case.functions["torch, channels-last, folded"] = partial(fold, x, packed_whole)
        case.functions["torch, channels-last, apart"] = partial(apart, x, packed)
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
                self.x, weight, None, *self.geometry, False, (0, 0), self.shape.groups
            )
        if chosen.name.startswith("Nnpack"):
            case.functions["NNPACK, contiguous, folded"] = without
        else:
            case.excluded["NNPACK"] = f"torch runs {chosen.name} here instead"

    def backward(self, exact: Tensor, exact_t: Tensor, quick: bool) -> Case:
        """Gradients of x and mask, from what a forward keeps. NNPACK has none in torch."""
        given = self.grad, self.x, self.weight, exact, exact_t
        grad, x, packed, y, _ = in_layout(given, LAST)
        u = self.convolve(x, packed)
        kept_x, kept_y, kept_u = (self.as_kept(tensor) for tensor in (x, y, u))

        def torch_grads(
            gain: Tensor, dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, t: Tensor
        ) -> Tensors:
            dz = dy * (y > 0)
            return (dz * t).sum((0, 2, 3)), self.input_grad(dz * gain, x, weight)

        def ours(way: Way) -> Tensors:
            vectors = self.mask, self.scale, self.shift
            sums, dx = self.masked_grads(grad, kept_x, kept_y, kept_u, vectors, way)
            return sums[1].sum(0), dx

        return self.with_ours(self.gradients("backward", torch_grads, given, quick), ours)

    def weight_gradient(self, exact: Tensor, quick: bool) -> Case:
        """The gradient of the weight, from what a forward keeps."""
        given = self.grad, self.x, self.weight, exact
        grad, x, _, y = in_layout(given, LAST)

        def torch_grad(gain: Tensor, dy: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> Tensors:
            return (self.grads(dy * (y > 0) * gain, x, weight, [False, True, False])[1],)

        def ours(way: Way) -> Tensors:
            vectors = self.mask, self.scale, self.shift
            geometry, needs = (*self.geometry, self.shape.groups), (False, True, False, False)
            _, dw, _, _ = torch.ops.mnp_fast.masked_conv2d_backward(
                grad, x, way.weight, y, None, *vectors, *geometry, *needs, way.algorithm
            )
            return (dw,)

        case = self.gradients("weight gradient", torch_grad, given, quick)
        return self.with_ours(case, ours, frozen=False)

    def gradients(
        self, what: str, function: Callable[..., Tensors], given: Tensors, quick: bool
    ) -> Case:
        """What torch makes, by a function of the gain and then the given tensors."""
        gain = (self.mask * self.scale)[:, None, None]
        last = in_layout(given, LAST)
        case = Case(
            f"{self.name}, {what}",
            {
                "torch, contiguous": partial(
                    function, gain, *in_layout(given, torch.contiguous_format)
                ),
                "torch, channels-last": partial(function, gain, *last),
            },
            function(gain.double(), *(tensor.double() for tensor in given)),
        )
        name = "torch.compile, channels-last"
        add_compiled(case, name, lambda: partial(compiled(function), gain, *last), quick)
        return case

    def with_ours(self, case: Case, ours: Callable[[Way], Tensors], *, frozen: bool = True) -> Case:
        """The case with this project's own competitors, and the operations of all."""
        for name, way in self.ways.items():
            if frozen or way.weight is self.weight:
                case.functions[f"{OURS} {name}"] = partial(ours, way)
        case.work = dict.fromkeys(case.functions, float(self.operations))
        return case


class Linear(Layer):
    """The same of a linear layer, as images of one pixel; its weight's gradient is torch's."""

    convolves = False

    def __init__(self, channels: int, neurons: int, batch: int) -> None:
        super().__init__(Shape(channels, neurons, 1, kernel=1), batch)
        self.name = f"linear, {channels} to {neurons}, {batch} rows"

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return (grad.flatten(1) @ weight.flatten(1))[:, :, None, None]

    def masked(self, x: Tensor, vectors: Tensors, way: Way) -> Tensor:
        y = masked_linear(x.flatten(1), way.weight.flatten(1), *vectors, activation="relu")
        return y[:, :, None, None]

    def as_kept(self, image: Tensor) -> Tensor:
        return as_image(image.flatten(1), per_sample=False)

    def masked_grads(
        self, grad: Tensor, x: Tensor, y: Tensor, u: Tensor, vectors: Tensors, way: Way
    ) -> tuple[Tensor, Tensor]:
        g = self.as_kept(grad)
        if kernel_wins(self.x.flatten(1), way.weight.flatten(1)):
            sums, dx = super().masked_grads(g, x, y, u, vectors, way)
            return sums, dx.movedim(1, -1).reshape(self.x.shape)
        needs = (True, False, True)
        dz, _, sums = torch.ops.mnp_fast.masked_affine_backward(g, u, y, *vectors, *needs)
        return sums, self.input_grad(dz.movedim(1, -1).reshape(grad.shape), self.x, way.weight)
