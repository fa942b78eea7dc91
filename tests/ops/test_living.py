"""Neurons whose mask is 0 for all samples are not computed."""

import pytest
import torch

from mnp_fast import reference
from mnp_fast.ops import masked_conv2d, masked_linear

from .cases import (
    Conv,
    assert_same_bits,
    assert_same_grads,
    conv_inputs,
    random_mask,
    relative_error,
    require_grad,
    torch_threads,
)
from .test_conv import compare


@pytest.fixture(autouse=True)
def _one_thread():
    """The problems are small: torch's threads would spend the time waiting for each other."""
    with torch_threads(1):
        yield


SQUARE = {
    "odd": Conv(3, 65, 7, 9, 37),
    "more neurons than tiles": Conv(1, 40, 5, 6, 130),
    "no padding": Conv(2, 70, 9, 10, 40, padding=(0, 0)),
    "no samples": Conv(0, 40, 5, 5, 24),
}
OTHERS = {
    "stride2": Conv(2, 24, 9, 10, 43, stride=(2, 2)),
    "kernel below stride": Conv(2, 33, 8, 8, 24, kernel=(2, 2), stride=(3, 3), padding=(0, 0)),
    "uneven": Conv(2, 34, 11, 8, 26, (5, 2), (3, 1), (0, 2), (1, 2)),
    "1x1": Conv(2, 190, 6, 5, 51, kernel=(1, 1), padding=(0, 0)),
    "one pixel": Conv(4, 190, 1, 1, 51, kernel=(1, 1), padding=(0, 0)),
    "grouped": Conv(2, 60, 6, 6, 48, groups=2),
    "depthwise": Conv(2, 24, 7, 7, 48, groups=24),
}
ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")
CASES = [
    *((name, algorithm) for name in SQUARE for algorithm in ALGORITHMS),
    *((name, "auto") for name in OTHERS),
]


def mostly_dead(conv: Conv, living: int, per_sample: bool) -> torch.Tensor:
    """A mask, or one a sample, that is not 0 everywhere for so many neurons only."""
    mask = torch.zeros(conv.n, conv.k) if per_sample else torch.zeros(conv.k)
    places = torch.randperm(conv.k)[:living]
    mask[..., places] = torch.rand(mask[..., places].shape) + 0.1
    if per_sample and conv.n > 1:
        mask[..., places] *= torch.rand(mask[..., places].shape) > 0.3
        mask[torch.arange(living) % conv.n, places] = 0.7
    return mask.double()


def inputs_of(conv: Conv, living: int, per_sample: bool = False, dtype=torch.float64):
    inputs = conv_inputs(conv, dtype)
    inputs["mask"] = mostly_dead(conv, living, per_sample).to(dtype)
    return inputs


def compare_fixed(inputs, conv, activation, tolerance, algorithm):
    """As `compare`, where masks and scales are fixed, so that u is not kept."""
    fixed = {name: inputs[name] for name in ("mask", "scale")}
    mine = {**require_grad(inputs), **fixed}
    exact = require_grad({k: v.double() for k, v in inputs.items()})
    exact |= {k: v.double() for k, v in fixed.items()}
    y = masked_conv2d(**mine, **conv.geometry, activation=activation, algorithm=algorithm)
    expected = reference.masked_conv2d(**exact, **conv.geometry, activation=activation)
    assert relative_error(y, expected) <= tolerance
    grad = torch.randn_like(expected).to(y.dtype)
    if activation == "relu":
        grad = grad * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    leaves = {k: v for k, v in exact.items() if k not in fixed}
    assert_same_grads(mine, leaves, tolerance)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("living", [0, 1, 11])
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_matches_reference_in_float64(name, algorithm, living, per_sample):
    conv = {**SQUARE, **OTHERS}[name]
    inputs = inputs_of(conv, living, per_sample)
    compare_fixed(inputs, conv, "none", 1e-13, algorithm)
    compare(inputs, conv, "relu", 1e-13, algorithm)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_every_dtype(name, algorithm, dtype, tolerance):
    conv = {**SQUARE, **OTHERS}[name]
    compare_fixed(inputs_of(conv, 8, dtype=dtype), conv, "relu", tolerance, algorithm)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [case for case in CASES if case[0] not in ("no samples", "grouped", "depthwise")],
)
def test_products_are_left_out(name, algorithm, per_sample):
    """A NaN in all products reaches the living neurons only, and no gradient of the input."""
    conv = {**SQUARE, **OTHERS}[name]
    inputs = inputs_of(conv, 8, per_sample)
    dead = (inputs["mask"] == 0).view(-1, conv.k).all(0)
    options = {**conv.geometry, "algorithm": algorithm}
    y = masked_conv2d(**{**inputs, "x": inputs["x"] * float("nan")}, **options)
    assert y[:, ~dead].isnan().any((2, 3)).all()
    rest = inputs["bias"].view(-1, 1, 1) + inputs["residual"]
    assert torch.equal(y[:, dead], rest[:, dead])
    mine = require_grad(inputs)
    y = masked_conv2d(**mine, **options)
    grad = torch.where(dead.view(-1, 1, 1), float("inf"), torch.ones_like(y))
    dx, dw = torch.autograd.grad(y, (mine["x"], mine["weight"]), grad)
    assert dx.isfinite().all()
    assert not dw[dead].any()


def test_residual_and_vectors_are_optional():
    conv = SQUARE["odd"]
    given = inputs_of(conv, 8)
    inputs = {name: given[name] for name in ("x", "weight", "mask")}
    expected = reference.masked_conv2d(**inputs, **conv.geometry)
    assert relative_error(masked_conv2d(**inputs, **conv.geometry), expected) <= 1e-13


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_of_any_stride(algorithm):
    conv = SQUARE["odd"]
    inputs = inputs_of(conv, 8)
    expected = masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    strided = {
        "x": inputs["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "weight": inputs["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "mask": inputs["mask"].repeat_interleave(3)[::3],
        "residual": inputs["residual"].repeat_interleave(2, dim=3)[..., ::2],
    }
    assert not any(t.is_contiguous() for t in strided.values())
    y = masked_conv2d(**{**inputs, **strided}, **conv.geometry, algorithm=algorithm)
    assert torch.equal(y, expected)
    last = {"weight": inputs["weight"].to(memory_format=torch.channels_last)}
    y = masked_conv2d(**{**inputs, **last}, **conv.geometry, algorithm=algorithm)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(1, 190), (3, 190), (2, 5, 190)])
def test_linear(shape):
    x, weight = torch.randn(shape).double(), torch.randn(51, 190).double()
    mask, bias = random_mask(51) * (torch.arange(51) % 4 == 1), torch.randn(51).double()
    y = masked_linear(x, weight, mask, bias=bias, activation="relu")
    expected = reference.masked_linear(x, weight, mask, bias=bias, activation="relu")
    assert relative_error(y, expected) <= 1e-13


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_whatever_the_number_of_threads(algorithm):
    conv = Conv(4, 64, 13, 13, 80)
    inputs = inputs_of(conv, 11, dtype=torch.float32)
    mine = {**require_grad(inputs), "mask": inputs["mask"], "scale": inputs["scale"]}
    leaves = [t for t in mine.values() if t.requires_grad]

    def compute():
        y = masked_conv2d(**mine, **conv.geometry, activation="relu", algorithm=algorithm)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert_same_bits(compute, (1, 2, 3, 5))


def test_masks_change_in_place():
    conv = SQUARE["odd"]
    inputs = inputs_of(conv, 8)
    for living in (8, 37, 0):
        inputs["mask"].copy_(mostly_dead(conv, living, False))
        expected = reference.masked_conv2d(**inputs, **conv.geometry)
        assert relative_error(masked_conv2d(**inputs, **conv.geometry), expected) <= 1e-13
