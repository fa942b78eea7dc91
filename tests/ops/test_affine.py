import pytest
import torch

from mnp_fast import reference
from mnp_fast.ops import masked_affine

from .cases import VECTORS, assert_same_grads, random_mask, relative_error, require_grad

SHAPES = [(3, 5), (4, 70), (2, 5, 7), (2, 6, 5, 4), (1, 70, 9, 9), (2, 3, 2, 3, 4), (0, 4, 3, 3)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def affine_inputs(shape, dtype=torch.float64, per_sample=False):
    k = shape[1]
    return {
        "x": torch.randn(*shape, dtype=dtype),
        "mask": random_mask(*(shape[:2] if per_sample else (k,)), dtype=dtype),
        **{name: torch.randn(k, dtype=dtype) for name in VECTORS[1:]},
        "residual": torch.randn(*shape, dtype=dtype),
    }


def compare(inputs, activation, tolerance):
    mine = require_grad(inputs)
    exact = require_grad({k: None if v is None else v.double() for k, v in inputs.items()})
    y = masked_affine(**mine, activation=activation)
    expected = reference.masked_affine(**exact, activation=activation)
    assert relative_error(y, expected) <= tolerance
    grad = torch.randn_like(expected).to(y.dtype)
    if activation == "relu":
        grad = grad * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    assert_same_grads(mine, exact, tolerance)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, activation, per_sample):
    compare(affine_inputs(shape, dtype, per_sample), activation, TOLERANCE[dtype])


@pytest.mark.parametrize("missing", [*VECTORS, "residual"])
def test_without_one_argument(missing):
    compare({**affine_inputs((2, 6, 5, 4)), missing: None}, "relu", 1e-13)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 6, 5, 4), torch.channels_last), ((2, 6, 5, 4, 3), torch.channels_last_3d)],
)
def test_memory_formats(shape, layout):
    inputs = affine_inputs(shape)
    inputs["x"] = inputs["x"].to(memory_format=layout)
    compare(inputs, "relu", 1e-13)
    assert masked_affine(**inputs).is_contiguous(memory_format=layout)
    inputs["x"] = inputs["x"].transpose(2, 3)
    inputs["residual"] = inputs["residual"].transpose(2, 3)
    compare(inputs, "relu", 1e-13)


def test_long_reductions_stay_exact():
    """Sums over many pixels keep float32's accuracy: no cancellation here, so no excuse."""
    x = torch.rand(1, 3, 300, 300)
    mask = torch.rand(3, requires_grad=True)
    masked_affine(x, mask).sum().backward()
    assert relative_error(mask.grad, x.double().sum((0, 2, 3))) <= 2e-7


def test_gradcheck():
    inputs = require_grad(affine_inputs((2, 3, 3, 2)))
    torch.autograd.gradcheck(
        lambda *args: masked_affine(*args, activation="relu"), tuple(inputs.values())
    )


@pytest.mark.parametrize("shape", [(3, 5), (2, 6, 5, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(shape, channels_last):
    inputs = affine_inputs(shape, torch.float32)
    if channels_last and len(shape) == 4:
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.mnp_fast.masked_affine.default, (*inputs, "relu"))


def test_opcheck_backward():
    x, mask, scale, shift, *_ = affine_inputs((2, 6, 5, 4), torch.float32).values()
    y = masked_affine(x, mask, scale, shift, activation="relu")
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        torch.library.opcheck(
            torch.ops.mnp_fast.masked_affine_backward.default,
            (torch.randn_like(y), x, y, mask, scale, shift, *needs),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_kernel_matches_the_compiled_one(dtype):
    from mnp_fast.ops import affine as module

    inputs = affine_inputs((2, 6, 5, 4), dtype)
    args = (*inputs.values(), "relu")
    y = torch.ops.mnp_fast.masked_affine(*args)
    assert relative_error(module._default(*args), y) <= 2 * TOLERANCE[dtype]
    vectors = [inputs[v] for v in ("mask", "scale", "shift")]
    args = (torch.randn_like(y), inputs["x"], y, *vectors, True, True, True)
    expected = torch.ops.mnp_fast.masked_affine_backward(*args)
    for actual, wanted in zip(module._backward_default(*args), expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x must have shape \(N, K, \*\), not \(3,\)"),
        ({"mask": torch.ones(2)}, r"mask must have shape \(3,\)"),
        ({"scale": torch.ones(3).double()}, "scale must have the input's dtype"),
        ({"residual": torch.ones(2, 3)}, "residual must have shape"),
        ({"activation": "gelu"}, "activation must be"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.ones(2, 3, 4, 4)}
    masked_affine(**good)
    with pytest.raises(RuntimeError, match=message):
        masked_affine(**{**good, **change})
