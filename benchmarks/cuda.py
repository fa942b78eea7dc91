"""The operators on a CUDA device, beside eager torch and torch.compile.

Work is captured in CUDA graphs of `CALLS` calls, for all competitors alike, so that times are those
of the device. Torch's setting of TF32 is left as it is, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast import backends, reference
from mnp_fast.ops import mask_update_, masked_conv2d, neuron_magnitude
from mnp_fast.triton import why_not_conv2d

from . import step
from .compiled import add_compiled, compiled
from .networks import channels_last, folded, freeze, network
from .roofline import epilogue_bytes, gradient_bytes
from .timing import OURS, Case, Function, Tensors

CALLS = 10
# Beyond the second cache, inside it, and late layers; few, as each is compiled twelve times.
SHAPES = [(128, 64, 56), (128, 64, 32), (128, 512, 4)]
TRITON = f"{OURS}, Triton"
STEP_LIMIT = 5e-2  # TF32 flips more ReLUs near 0 than float32 does
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def cases(quick: bool, device: str) -> Iterator[Case]:
    """What is done to all layers at once, epilogues alone, whole layers, and a mask step."""
    yield magnitudes(device, quick)
    yield updates(device, quick)
    for index, (n, k, side) in enumerate([(2, 5, 4)] if quick else SHAPES):
        for dtype, limit in list(DTYPES.items())[: 1 if quick else 2]:
            for layout in LAYOUTS:
                images = Images(n, k, side, dtype, layout, device)
                yield images.backward(limit, quick)
                yield images.forward(limit, quick)
                yield images.layer(limit, quick)
        if index == 0:
            yield mask_step(device, quick)


def device_line() -> str:
    """The device and what its figures depend on."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}; float32 convolutions in {precision}"
    )


def repeated(function: Function, device: str) -> Function:
    """`CALLS` calls, as a graph where the device is a GPU."""
    if device == "cpu":
        return lambda: [function() for _ in range(CALLS)][-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function() for _ in range(CALLS)][-1]

    def replay() -> Tensors:
        graph.replay()
        return results

    return replay


class Images:
    """Random images and vectors, and the work on them."""

    def __init__(self, n: int, k: int, side: int, dtype: torch.dtype, layout: str, device: str):
        self.device, self.dtype, self.item = device, dtype, dtype.itemsize
        self.name = f"{n}x{k}x{side}x{side}, {str(dtype).removeprefix('torch.')}, {layout}"

        def image() -> Tensor:
            x = torch.randn(n, k, side, side, device=device).to(dtype)
            return x.contiguous(memory_format=LAYOUTS[layout])

        self.u, self.residual, self.grad = image(), image(), image()
        vectors = torch.rand(4, k, device=device)
        self.mask, self.scale, self.shift, self.bias = vectors.unbind()
        self.weight = torch.randn(k, k, 3, 3, device=device).to(dtype) / (3 * k**0.5)
        self.weight = self.weight.contiguous(memory_format=LAYOUTS[layout])

    def case(
        self,
        what: str,
        plain: Callable[..., Tensors],
        arguments: tuple[Tensor, ...],
        ours: Function,
        limit: float,
        quick: bool,
    ) -> Case:
        """Eager, compiled and our own."""
        case = Case(
            f"{what}, {self.name}, {CALLS} calls",
            {"torch eager": repeated(partial(plain, *arguments), self.device)},
            plain(*(t.double() for t in arguments)),
            limit,
        )
        add_compiled(
            case,
            "torch.compile",
            lambda: repeated(partial(compiled(plain), *arguments), self.device),
            quick,
        )
        case.functions[OURS] = repeated(ours, self.device)
        return case

    def forward(self, limit: float, quick: bool) -> Case:
        """The epilogue of what a convolution has computed."""
        vectors = (self.mask, self.scale, self.shift, self.bias)
        dtype = self.dtype

        def plain(
            u: Tensor, residual: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, bias: Tensor
        ) -> Tensors:
            y = reference.epilogue(u, mask, scale, shift, bias, residual, "relu")
            return (y if u.dtype == torch.float64 else y.to(dtype),)

        def ours() -> Tensors:
            arguments = (self.u, *vectors, self.residual, "relu")
            return (torch.ops.mnp_fast.masked_affine(*arguments),)

        arguments = (self.u, self.residual, *vectors)
        case = self.case("epilogue", plain, arguments, ours, limit, quick)
        moved = CALLS * epilogue_bytes(self.u.numel(), self.item)
        case.work, case.unit = dict.fromkeys(case.functions, float(moved)), "B"
        return case

    def backward(self, limit: float, quick: bool) -> Case:
        """Its gradients: those of u, of the residual and of the mask."""
        vectors = (self.mask, self.scale, self.shift)
        y = self.u.relu()
        dtype = self.dtype

        def plain(grad: Tensor, y: Tensor, u: Tensor, *vectors: Tensor) -> Tensors:
            dz, g, sums = reference.epilogue_backward(grad, y, u, *vectors)
            if u.dtype == torch.float64:
                return g, dz, sums[1].sum(0)
            return g.to(dtype), dz, sums[1].sum(0)

        def ours() -> Tensors:
            arguments = (self.grad, self.u, y, *vectors, True, True, True)
            g, dz, sums = torch.ops.mnp_fast.masked_affine_backward(*arguments)
            return g, dz, sums[1].sum(0)

        arguments = (self.grad, y, self.u, *vectors)
        case = self.case("epilogue's gradient", plain, arguments, ours, 5 * limit, quick)
        moved = CALLS * gradient_bytes(self.u.numel(), self.item)
        case.work, case.unit = dict.fromkeys(case.functions, float(moved)), "B"
        return case

    def layer(self, limit: float, quick: bool) -> Case:
        """A convolution with its epilogue: torch's own has scale and shift in its weights."""
        gain = self.scale * self.mask
        offset = self.shift * self.mask + self.bias

        def plain(
            x: Tensor, weight: Tensor, gain: Tensor, offset: Tensor, residual: Tensor
        ) -> Tensors:
            folded = weight * gain.to(weight.dtype)[:, None, None, None]
            y = F.conv2d(x, folded, offset.to(weight.dtype), padding=1)
            return (F.relu(y + residual),)

        def ours() -> Tensors:
            vectors = (self.mask, self.scale, self.shift, self.bias, self.residual)
            y = masked_conv2d(self.u, self.weight, *vectors, padding=1, activation="relu")
            return (y,)

        def by_triton() -> Tensors:
            with backends.use(masked_conv2d="triton"):
                return ours()

        arguments = (self.u, self.weight, gain, offset, self.residual)
        limit = max(5 * limit, 2e-3)  # TF32
        with torch.no_grad():
            case = self.case("3x3 layer", plain, arguments, ours, limit, quick)
            if (why := why_not_conv2d(self.u, self.weight)) is None:
                case.functions[TRITON] = repeated(by_triton, self.device)
            else:
                case.excluded[TRITON] = why
        return case


def layer_shapes(quick: bool) -> list[tuple[int, ...]]:
    """Weights of a ResNet-18."""
    width = 4 if quick else 64
    stages = [width << i for i in range(4)]
    inner = [(c, c, 3, 3) for c in stages for _ in range(3)]
    return [(width, 3, 3, 3), *inner, *((2 * c, c, 3, 3) for c in stages[:3])]


def magnitudes(device: str, quick: bool) -> Case:
    """Norms of the neurons of all layers."""
    weights = [torch.randn(shape, device=device) for shape in layer_shapes(quick)]

    def plain(*weights: Tensor) -> Tensors:
        return tuple(torch.linalg.vector_norm(w.flatten(1), 1, 1) for w in weights)

    size = float(CALLS * sum(w.nbytes for w in weights))
    functions: dict[str, Function] = {
        "torch eager": repeated(partial(plain, *weights), device),
        OURS: repeated(lambda: tuple(neuron_magnitude(weights)), device),
    }
    exact = plain(*(w.double() for w in weights))
    name = f"magnitudes of {len(weights)} layers, {CALLS} calls"
    return Case(name, functions, exact, work=dict.fromkeys(functions, size), unit="B")


def updates(device: str, quick: bool) -> Case:
    """The mask step of all layers."""
    sizes = [shape[0] for shape in layer_shapes(quick)]
    given = [[torch.rand(size, device=device) for size in sizes] for _ in range(4)]
    options = {"lr": 0.0, "momentum": 0.5, "penalty": 0.3}  # without a rate, masks stay

    def run(update: Callable[..., None], lists: list[list[Tensor]]) -> Tensors:
        masks, grads, velocities, magnitudes = lists
        for velocity in velocities:
            velocity.zero_()
        update(masks, grads, velocities, magnitudes, **options)
        return (*masks, *velocities)

    functions: dict[str, Function] = {
        name: repeated(partial(run, update, [[t.clone() for t in ts] for ts in given]), device)
        for name, update in (("torch eager", reference.mask_update_), (OURS, mask_update_))
    }
    exact = run(reference.mask_update_, [[t.double() for t in ts] for ts in given])
    return Case(f"mask update of {len(sizes)} layers, {CALLS} calls", functions, exact)


def mask_step(device: str, quick: bool) -> Case:
    """Forward, gradients of all masks and their update, of a ResNet-18 for small images."""
    width, size, batch = (4, 8, 4) if quick else (64, 32, 128)
    model = network(width).to(device)
    x, labels = (t.to(device) for t in step.batch_of(size, batch))
    functions: dict[str, Function] = {
        f"torch eager, {layout}, folded": step.folded_step(model, x, labels, last=last)
        for layout, last in (("NCHW", False), ("NHWC", True))
    }
    functions[OURS] = step.our_step(model, x, labels)
    case = Case(
        f"mask step, ResNet-18 width {width}, {size}x{size}, batch {batch}, {CALLS} calls",
        {name: repeated(function, device) for name, function in functions.items()},
        step.exact_mask_gradients(model, x, labels),
        STEP_LIMIT,
    )

    def compiled_step() -> Function:
        best = channels_last(freeze(folded(model)))
        images = x.contiguous(memory_format=torch.channels_last)
        return repeated(step.plain_step(best, compiled(best), images, labels), device)

    add_compiled(case, "torch.compile, NHWC, folded", compiled_step, quick)
    return case
