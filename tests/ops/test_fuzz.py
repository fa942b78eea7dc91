"""Random problems against the reference in float64. A seed alone makes the problem."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast import reference
from mnp_fast.ops import masked_affine, masked_conv2d, masked_linear
from mnp_fast.ops.conv import output_size

from .cases import VECTORS, Conv, conv_inputs, random_mask, torch_threads

# Rounding, relative to what a result would be if nothing in it cancelled.
TOLERANCE = {
    torch.float64: 1e-15,
    torch.float32: 5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
WINOGRAD = 10  # times as much
HALF = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu")
Pair = tuple[int, int]
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problems are small: torch's threads would spend the time waiting for each other."""
    with torch_threads(1):
        yield


def contiguous(t: Tensor, draw: random.Random) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor, draw: random.Random) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def permuted(t: Tensor, draw: random.Random) -> Tensor:
    order = draw.sample(range(t.dim()), t.dim())
    back = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)


def sliced(t: Tensor, draw: random.Random) -> Tensor:
    """Every second element along one axis of a larger tensor, from its second one on."""
    axis = draw.randrange(t.dim())
    shape = list(t.shape)
    shape[axis] = 2 * shape[axis] + 1
    view = t.new_full(shape, float("nan")).narrow(axis, 1, 2 * t.shape[axis])
    index = (slice(None),) * axis + (slice(None, None, 2),)
    return view[index].copy_(t)


def expanded(t: Tensor, draw: random.Random) -> Tensor:
    """One slice repeated along an axis, without a copy of it."""
    axis = draw.randrange(t.dim())
    return t.narrow(axis, 0, min(1, t.shape[axis])).expand(t.shape)


LAYOUTS = (contiguous, channels_last, permuted, sliced, expanded)


@dataclass(frozen=True)
class Problem:
    """Tensors for an operator, and the options that go with them."""

    inputs: dict[str, Tensor]
    options: dict[str, object]
    draw: random.Random

    def run(self, function: Callable[..., Tensor], inputs: dict[str, Tensor], **more) -> Tensor:
        return function(**inputs, **{**self.options, **more})

    def gradient(self, y: Tensor, expected: Tensor) -> Tensor:
        """A gradient of y in some layout, 0 where rounding has flipped the sign of a z near 0."""
        grad = torch.randn(y.shape, dtype=y.dtype)
        if self.options["activation"] == "relu":
            grad = torch.where((y > 0) == (expected > 0), grad, 0)
        return self.draw.choice(LAYOUTS[:-1])(grad, self.draw)


def draw_tensors(draw: random.Random, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, some left out, in layouts and dtypes that the operators take."""
    given = {}
    for name, t in inputs.items():
        if name not in ("x", "weight") and draw.random() < 0.25:
            continue
        given[name] = draw.choice(LAYOUTS)(t, draw)
        if name in VECTORS and t.dtype in HALF and draw.random() < 0.5:
            given[name] = given[name].float()
    return given


def draw_conv(draw: random.Random, algorithm: str) -> Conv:
    """Any convolution that fits its image and that the algorithm can compute."""
    winograd = algorithm.startswith("winograd")
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
    kernel = (3, 3) if winograd else draw.choice([(1, 1), (3, 3), (5, 5), pair(1, 4)])
    stride, dilation = ((1, 1), (1, 1)) if winograd else (pair(1, 3), pair(1, 3))
    if winograd:
        kinds = [((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 1))]
        kernel, stride = draw.choice(kinds[: 3 if algorithm == "winograd4" else 2])
    if winograd and stride == (1, 1) and draw.random() < 0.3:
        dilation = pair(1, 3)
    kinds = ["dense", "dense", "grouped", "narrow", "depthwise", "depthwise square", "blocks"]
    kind = draw.choice(kinds[:4] if winograd else kinds)
    if kind == "depthwise square":
        size, step = draw.choice((3, 5, 7)), draw.choice((1, 2))
        kernel, stride, dilation = (size, size), (step, step), (1, 1)
    elif kind == "blocks":
        step = draw.choice((1, 2))
        kernel, stride, dilation = (3, 3), (step, step), (1, 1)
    padding = pair(0, 2)
    h, w = (
        max(1, d * (k - 1) + 1 - 2 * p) + draw.choice((0, 0, 1, 4, 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    c, k, groups = draw.choice(CHANNELS), draw.choice(CHANNELS), 1
    if kind == "grouped":
        groups = draw.randint(2, 3)
        c, k = groups * draw.choice(CHANNELS[:9]), groups * draw.choice(CHANNELS[:9])
    elif kind == "narrow":
        groups = draw.randint(2, 16)
        c = k = groups * draw.choice((2, 4, 8))
    elif kind == "blocks":
        groups = draw.randint(2, 9)
        width = draw.choice((2, 3, 4, 8, 11, 16, 20))
        c, k = groups * width, groups * draw.choice((width, width, 5, 24))
    elif kind == "depthwise":
        groups, k = c, c * draw.choice((1, 1, 2))
    elif kind == "depthwise square":
        groups = k = c
    n = draw.choice((1, 1, 2, 3, 5))
    return Conv(n, c, h, w, k, kernel, stride, padding, dilation, groups)


def conv_problem(seed: int, dtype: torch.dtype, algorithm: str) -> Problem:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    conv = draw_conv(draw, algorithm)
    inputs = draw_tensors(draw, conv_inputs(conv, dtype, draw.random() < 0.5))
    return Problem(inputs, {**conv.geometry, "activation": draw.choice(ACTIVATIONS)}, draw)


def affine_problem(seed: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    n, k = draw.choice((1, 2, 5)), draw.choice((*CHANNELS, 65, 130))
    shape = (n, k, *(draw.choice((1, 2, 3, 7, 9)) for _ in range(draw.randint(0, 3))))
    inputs = {"x": torch.randn(shape, dtype=dtype)}
    inputs["mask"] = random_mask(*draw.choice([(k,), (n, k)]), dtype=dtype)
    inputs |= {name: torch.randn(k, dtype=dtype) for name in VECTORS[1:]}
    inputs["residual"] = torch.randn(shape, dtype=dtype)
    return Problem(draw_tensors(draw, inputs), {"activation": draw.choice(ACTIVATIONS)}, draw)


def linear_problem(seed: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    c, k = draw.choice(CHANNELS), draw.choice(CHANNELS)
    shape = [draw.choice((1, 2, 5)) for _ in range(draw.randint(1, 3))]
    inputs = {"x": torch.randn(*shape, c, dtype=dtype), "weight": torch.randn(k, c, dtype=dtype)}
    inputs["mask"] = random_mask(*draw.choice([(k,), (shape[0], k)]), dtype=dtype)
    inputs |= {name: torch.randn(k, dtype=dtype) for name in VECTORS[1:]}
    inputs["residual"] = torch.randn(*shape, k, dtype=dtype)
    return Problem(draw_tensors(draw, inputs), {"activation": draw.choice(ACTIVATIONS)}, draw)


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that ask for gradients, on the same memory."""
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def assert_close(actual: Tensor, expected: Tensor, size: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    info = torch.finfo(actual.dtype)
    subnormal = info.smallest_normal * info.eps * actual.numel() ** 0.5
    assert (actual.double() - expected).norm() <= tolerance * size.norm() + subnormal


def check(
    problem: Problem,
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    tolerance: float,
    **options: object,
) -> None:
    """Output and gradients, with errors relative to what they would be without cancellation."""
    mine = leaves(problem.inputs)
    exact = leaves({name: t.double() for name, t in mine.items()})
    sizes = leaves({name: t.double().abs() for name, t in mine.items()})
    y = problem.run(function, mine, **options)
    expected = problem.run(definition, exact)
    size = problem.run(definition, sizes, activation="none")
    assert y.dtype == mine["x"].dtype
    assert_close(y, expected, size, tolerance)
    grad = problem.gradient(y, expected)
    results = zip(
        mine.values(),
        torch.autograd.grad(y, list(mine.values()), grad),
        torch.autograd.grad(expected, list(exact.values()), grad.double()),
        torch.autograd.grad(size, list(sizes.values()), grad.double().abs()),
        strict=True,
    )
    for leaf, actual, wanted, bound in results:
        assert actual.dtype == leaf.dtype
        assert_close(actual, wanted, bound, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("seed", range(40))
def test_conv(seed, algorithm, dtype):
    problem = conv_problem(seed, dtype, algorithm)
    tolerance = TOLERANCE[dtype] * (1 if algorithm == "direct" or dtype in HALF else WINOGRAD)
    check(problem, masked_conv2d, reference.masked_conv2d, tolerance, algorithm=algorithm)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_affine(seed, dtype):
    problem = affine_problem(seed, dtype)
    check(problem, masked_affine, reference.masked_affine, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_linear(seed, dtype):
    problem = linear_problem(seed, dtype)
    check(problem, masked_linear, reference.masked_linear, TOLERANCE[dtype])


def spoil(t: Tensor, draw: random.Random, count: int) -> Tensor:
    """A copy with an infinity or a NaN in up to `count` places."""
    t = t.clone(memory_format=torch.contiguous_format)
    for _ in range(count):
        t.view(-1)[draw.randrange(t.numel())] = draw.choice(NOT_FINITE)
    return t


def pattern(t: Tensor) -> Tensor:
    """0 where finite; else which of NaN and the infinities it is."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def assert_same_pattern(
    problem: Problem, function: Callable[..., Tensor], definition: Callable[..., Tensor], **options
) -> None:
    """Where the spoiled inputs reach the output and the gradients, and as what."""
    draw = problem.draw
    names = [name for name in problem.inputs if name not in ("weight", "mask")]
    for name in draw.sample(names, draw.randint(0, 2)):
        problem.inputs[name] = spoil(problem.inputs[name], draw, 2)
    mine = leaves(problem.inputs)
    exact = leaves({name: t.double() for name, t in mine.items()})
    y, expected = problem.run(function, mine, **options), problem.run(definition, exact)
    assert torch.equal(pattern(y), pattern(expected))
    grad = spoil(problem.gradient(y, expected), draw, draw.randint(0, 2))
    actual = torch.autograd.grad(y, list(mine.values()), grad)
    wanted = torch.autograd.grad(expected, list(exact.values()), grad.double())
    for name, a, b in zip(mine, actual, wanted, strict=True):
        assert torch.equal(pattern(a), pattern(b)), name


def all_living(problem: Problem) -> Problem:
    """The same without masks at 0, whose neurons need not be computed."""
    if "mask" in problem.inputs:
        mask = problem.inputs["mask"]
        problem.inputs["mask"] = torch.where(mask == 0, 0.5, mask)
    return problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_not_finite_in_direct_conv(seed, dtype):
    problem = all_living(conv_problem(seed, dtype, "direct"))
    assert_same_pattern(problem, masked_conv2d, reference.masked_conv2d, algorithm="direct")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_not_finite_in_affine(seed, dtype):
    assert_same_pattern(affine_problem(seed, dtype), masked_affine, reference.masked_affine)


def inside_only(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """conv2d that leaves out the padding, in place of multiplying weights by its zeros."""
    size = output_size(x.shape, weight.shape, stride, padding, dilation)
    u = x.new_zeros(size)
    for tap in product(*map(range, weight.shape[2:])):
        reads, writes = [], []
        for i in range(2):
            at = torch.arange(size[2 + i]) * stride[i] + tap[i] * dilation[i] - padding[i]
            inside = (at >= 0) & (at < x.shape[2 + i])
            reads.append(at[inside])
            writes.append(inside.nonzero()[:, 0])
        if len(writes[0]) and len(writes[1]):
            part = x[:, :, reads[0]][..., reads[1]]
            kernel = weight[:, :, tap[0], tap[1], None, None]
            u[:, :, writes[0][:, None], writes[1]] += F.conv2d(part, kernel, groups=groups)
    return u


@pytest.mark.parametrize("seed", range(40))
def test_not_finite_weights(seed):
    """As documented: what an infinite or NaN weight makes of padding may be left out."""
    problem = all_living(conv_problem(seed, torch.float32, "direct"))
    problem.inputs["weight"] = spoil(problem.inputs["weight"], problem.draw, 2)
    y = problem.run(masked_conv2d, problem.inputs, algorithm="direct")
    exact = {name: t.double() for name, t in problem.inputs.items()}
    multiplied = pattern(problem.run(reference.masked_conv2d, exact))
    geometry = {name: value for name, value in problem.options.items() if name != "activation"}
    u = inside_only(exact.pop("x"), exact.pop("weight"), **geometry)
    left_out = pattern(reference.epilogue(u, **exact, activation=problem.options["activation"]))
    assert ((pattern(y) == multiplied) | (pattern(y) == left_out)).all()


def tiles(not_finite: Tensor, size: int) -> Tensor:
    """Every square tile of an image in which some neuron is not finite."""
    h, w = not_finite.shape[2:]
    touched = F.max_pool2d(not_finite.amax(1, keepdim=True).double(), size, ceil_mode=True)
    spread = touched.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return spread[:, :, :h, :w].bool().expand_as(not_finite)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
@pytest.mark.parametrize("seed", range(40))
def test_not_finite_stays_in_its_winograd_tile(seed, algorithm, dtype):
    """As documented: nothing is hidden, and nothing leaves the tile; of weights, the channel."""
    conv = draw_conv(random.Random(seed), algorithm)
    torch.manual_seed(seed)
    draw = random.Random(seed)
    x = spoil(torch.randn(conv.n, conv.c, conv.h, conv.w, dtype=dtype), draw, 2)
    weight = torch.randn(conv.k, conv.c // conv.groups, *conv.kernel, dtype=dtype)
    mine = leaves({"x": x, "weight": weight})
    exact = leaves({"x": x.double(), "weight": weight.double()})
    y = masked_conv2d(**mine, **conv.geometry, algorithm=algorithm)
    expected = reference.masked_conv2d(**exact, **conv.geometry)
    grad = spoil(torch.randn_like(y), draw, 2)
    dx, dw = torch.autograd.grad(y, list(mine.values()), grad)
    dx_wanted, dw_wanted = torch.autograd.grad(expected, list(exact.values()), grad.double())
    neurons, channels = ((~t.isfinite()).transpose(0, 1).flatten(1).any(1) for t in (grad, x))
    hit = ~dw.isfinite()
    assert hit[~dw_wanted.isfinite()].all()
    read = channels.view(conv.groups, -1).repeat_interleave(conv.k // conv.groups, 0)
    assert not hit[~(neurons[:, None] | read)].any()
    tile = 2 if conv.kernel == (5, 5) else int(algorithm[-1])
    for a, b, edge in ((y, expected, tile), (dx, dx_wanted, tile * conv.stride[0])):
        hit = ~a.isfinite()
        assert hit[~b.isfinite()].all()
        assert not hit[~tiles(~b.isfinite(), edge)].any()
