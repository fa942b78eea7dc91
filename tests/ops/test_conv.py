import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from mnp_fast import _C, frozen_weights, reference, wrap
from mnp_fast.ops import masked_conv2d, masked_linear

from .cases import (
    CONVS,
    VECTORS,
    Conv,
    assert_same_bits,
    assert_same_grads,
    conv_inputs,
    random_mask,
    relative_error,
    require_grad,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def compare(inputs, conv, activation, tolerance, algorithm="auto"):
    """Output and every gradient against autograd through the reference in float64."""
    mine = require_grad(inputs)
    exact = require_grad({k: None if v is None else v.double() for k, v in inputs.items()})
    y = masked_conv2d(**mine, **conv.geometry, activation=activation, algorithm=algorithm)
    expected = reference.masked_conv2d(**exact, **conv.geometry, activation=activation)
    assert y.shape == expected.shape
    assert relative_error(y, expected) <= tolerance
    grad = torch.randn_like(expected).to(y.dtype)
    # Rounding may flip the sign of a z near 0; its gradient is then not comparable.
    if activation == "relu":
        grad = grad * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    assert_same_grads(mine, exact, tolerance)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("name", CONVS)
def test_matches_reference_in_float64(name, activation, per_sample):
    compare(conv_inputs(CONVS[name], per_sample=per_sample), CONVS[name], activation, 1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONVS)
def test_every_dtype(name, dtype):
    compare(conv_inputs(CONVS[name], dtype), CONVS[name], "relu", TOLERANCE[dtype], "direct")


LARGE = {  # enough work for torch's convolution to be called where it wins
    "image": Conv(8, 3, 40, 41, 24),
    "one channel": Conv(8, 1, 40, 41, 40, kernel=(5, 5), padding=(2, 2)),
    "odd channels": Conv(5, 7, 31, 30, 21),
    "1x1 stride 2": Conv(9, 48, 33, 32, 48, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    "5x5": Conv(3, 24, 17, 16, 24, kernel=(5, 5), padding=(2, 2)),
    "groups of 8": Conv(8, 32, 33, 32, 32, groups=4),
    "depthwise": Conv(8, 64, 33, 32, 64, groups=64),
    "depthwise 5x5": Conv(4, 64, 17, 16, 64, kernel=(5, 5), padding=(2, 2), groups=64),
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_float32_with_much_work(name, per_sample):
    conv = LARGE[name]
    inputs = conv_inputs(conv, torch.float32, per_sample)
    compare(inputs, conv, "relu", 1e-5)  # gradients of weights are Winograd's
    inputs["residual"] = None
    compare(inputs, conv, "none", 1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_float32_with_much_work_and_no_vectors(name, channels_last):
    """The gradient of u is that of the output, which the backward must leave as it is."""
    conv = LARGE[name]
    given = conv_inputs(conv, torch.float32)
    inputs = {name: given[name] for name in ("x", "weight")}
    if channels_last:
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    compare(inputs, conv, "none", 1e-5)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dead", [0, 0.9, 1])
def test_float32_with_much_work_and_dead_neurons(name, dead):
    conv = LARGE[name]
    inputs = conv_inputs(conv, torch.float32)
    inputs["mask"][: round(dead * conv.k)] = 0
    doubles = {name: t.double() for name, t in inputs.items()}
    expected = reference.masked_conv2d(**doubles, **conv.geometry, activation="relu")
    y = masked_conv2d(**inputs, **conv.geometry, activation="relu")
    assert relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=5)))
def test_any_subset_of_vectors(given):
    conv = CONVS["odd"]
    inputs = conv_inputs(conv)
    for name, present in zip((*VECTORS, "residual"), given, strict=True):
        if not present:
            inputs[name] = None
    compare(inputs, conv, "relu", 1e-13)


def test_random_shapes():
    draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    for _ in range(60):
        groups = draw(1, 3)
        kernel = (draw(1, 4), draw(1, 4))
        dilation = (draw(1, 2), draw(1, 2))
        conv = Conv(
            n=draw(1, 3),
            c=groups * draw(1, 6),
            h=draw(7, 12),
            w=draw(7, 12),
            k=groups * draw(1, 40),
            kernel=kernel,
            stride=(draw(1, 3), draw(1, 3)),
            padding=(draw(0, 3), draw(0, 3)),
            dilation=dilation,
            groups=groups,
        )
        compare(conv_inputs(conv, per_sample=bool(draw(0, 1))), conv, "relu", 1e-13)


@pytest.mark.parametrize("sizes", [(2, 1, 5, 6), (2, 3, 1, 1), (2, 1, 1, 1), (2, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_of_one_channel_or_pixel_has_the_format_that_torch_gives_it(sizes, layout):
    x = torch.empty(sizes, memory_format=layout).normal_()
    weight = torch.randn(4, sizes[1], 3, 3)
    y = masked_conv2d(x, weight, padding=2)
    with FakeTensorMode() as mode:
        fake = masked_conv2d(mode.from_tensor(x), mode.from_tensor(weight), padding=2)
    last = F.conv2d(x, weight, padding=2).is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last) == last
    assert fake.stride() == y.stride()


def test_channels_last_in_and_out():
    conv = CONVS["stride2"]
    inputs = conv_inputs(conv)
    for name in ("x", "weight", "residual"):
        inputs[name] = inputs[name].to(memory_format=torch.channels_last)
    compare(inputs, conv, "relu", 1e-13)
    y = masked_conv2d(**inputs, **conv.geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain = {k: v.contiguous() for k, v in inputs.items()}
    assert masked_conv2d(**plain, **conv.geometry).is_contiguous()


def test_inputs_of_any_stride():
    conv = CONVS["3x3"]
    inputs = conv_inputs(conv)
    expected = reference.masked_conv2d(**inputs, **conv.geometry)
    strided = {
        "x": inputs["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "weight": inputs["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "residual": inputs["residual"].repeat_interleave(2, dim=3)[..., ::2],
        **{name: inputs[name].repeat_interleave(3)[::3] for name in VECTORS},
    }
    assert not any(t.is_contiguous() for t in strided.values())
    assert relative_error(masked_conv2d(**strided, **conv.geometry), expected) <= 1e-13
    x, weight, *_ = (t.detach().requires_grad_() for t in strided.values())
    y = masked_conv2d(x, weight, **conv.geometry)
    y.backward(torch.ones(()).double().expand_as(y))
    exact = require_grad({"x": inputs["x"], "weight": inputs["weight"]})
    reference.masked_conv2d(**exact, **conv.geometry).sum().backward()
    assert relative_error(x.grad, exact["x"].grad) <= 1e-13
    assert relative_error(weight.grad, exact["weight"].grad) <= 1e-13


@pytest.mark.parametrize("name", ["odd", "uneven", "grouped"])
def test_gradcheck(name):
    conv = CONVS[name]
    inputs = require_grad(conv_inputs(conv))
    torch.autograd.gradcheck(
        lambda *args: masked_conv2d(*args, **conv.geometry, activation="relu"),
        tuple(inputs.values()),
    )


@pytest.mark.parametrize("keep_u", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["odd", "stride2", "depthwise", "one pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(name, channels_last, keep_u, dtype):
    conv = CONVS[name]
    inputs = conv_inputs(conv, dtype)
    if channels_last:
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    inputs = {k: v.requires_grad_(keep_u or k not in ("mask", "scale")) for k, v in inputs.items()}
    geometry = [list(v) if isinstance(v, tuple) else v for v in conv.geometry.values()]
    args = (*inputs.values(), *geometry, "relu", keep_u)
    torch.library.opcheck(torch.ops.mnp_fast.masked_conv2d.default, args)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_opcheck_backward(needs):
    conv = CONVS["stride2"]
    inputs = conv_inputs(conv, torch.float32)
    geometry = [list(v) if isinstance(v, tuple) else v for v in conv.geometry.values()]
    y, u = torch.ops.mnp_fast.masked_conv2d(*inputs.values(), *geometry, "relu", True)
    vectors = [inputs[name] for name in ("mask", "scale", "shift")]
    args = (torch.randn_like(y), inputs["x"], inputs["weight"], y, u, *vectors, *geometry, *needs)
    torch.library.opcheck(
        torch.ops.mnp_fast.masked_conv2d_backward.default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_unwanted_gradients_are_not_computed(monkeypatch):
    conv = CONVS["3x3"]
    inputs = conv_inputs(conv)
    inputs["mask"].requires_grad_()
    saw = []
    original = torch.ops.mnp_fast.masked_conv2d_backward

    def spy(*args):
        saw.append(args[-5:])
        return original(*args)

    monkeypatch.setattr(torch.ops.mnp_fast, "masked_conv2d_backward", spy)
    masked_conv2d(**inputs, **conv.geometry, activation="relu").sum().backward()
    assert saw == [(False, False, False, True, "auto")]
    assert inputs["weight"].grad is None


def test_mask_gradient_needs_what_the_forward_kept():
    inputs = conv_inputs(CONVS["3x3"])
    inputs["mask"].requires_grad_()
    y, _ = torch.ops.mnp_fast.masked_conv2d(
        *inputs.values(), [1, 1], [1, 1], [1, 1], 1, "none", False
    )
    with pytest.raises(RuntimeError, match="keep_u"):
        y.sum().backward()


def test_double_backward_is_refused():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(masked_conv2d(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second time"):
        dx.sum().backward()


@pytest.mark.parametrize("stride", [1, 2])
def test_images_without_rows(stride):
    x = torch.ones(2, 3, 0, 5, requires_grad=True)
    bias = torch.randn(4)
    y = masked_conv2d(x, torch.ones(4, 3, 3, 3), bias=bias, stride=stride, padding=2)
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_nan_and_infinity_go_through():
    x = torch.zeros(1, 1, 1, 2)
    x[..., 0], x[..., 1] = float("nan"), float("inf")
    y = masked_conv2d(x, torch.ones(1, 1, 1, 1), activation="relu")
    assert y[..., 0].isnan()
    assert y[..., 1].isinf()


def test_same_bits_whatever_the_number_of_threads():
    conv = Conv(4, 24, 13, 13, 40)
    inputs = require_grad(conv_inputs(conv, torch.float32))

    def compute():
        y = masked_conv2d(**inputs, **conv.geometry, activation="relu")
        return y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))

    assert_same_bits(compute, (1, 2, 3))


@pytest.mark.parametrize(
    "conv",
    [
        Conv(9, 700, 3, 4, 40, kernel=(1, 1), padding=(0, 0)),
        Conv(9, 700, 5, 4, 40, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
        Conv(9, 9, 8, 8, 70, kernel=(7, 7), padding=(3, 3)),
        Conv(9, 70, 3, 3, 60),
    ],
    ids=str,
)
def test_direct_rounds_a_sample_alike_in_any_batch(conv):
    inputs = require_grad(conv_inputs(conv, torch.float32))
    options = {**conv.geometry, "algorithm": "direct"}
    whole = masked_conv2d(**inputs, **options)
    grad = torch.randn_like(whole)
    (dx,) = torch.autograd.grad(whole, inputs["x"], grad)
    inputs["x"], inputs["residual"] = inputs["x"][4:5], inputs["residual"][4:5]
    alone = masked_conv2d(**inputs, **options)
    assert torch.equal(alone, whole[4:5])
    (dx_alone,) = torch.autograd.grad(alone, inputs["x"], grad[4:5])
    assert torch.equal(dx_alone, dx[4:5])


def test_compiles_without_graph_breaks():
    conv = CONVS["odd"]
    inputs = require_grad(conv_inputs(conv, torch.float32))

    def loss(**tensors):
        return masked_conv2d(**tensors, **conv.geometry, activation="relu").square().sum()

    expected = torch.autograd.grad(loss(**inputs), list(inputs.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**inputs), list(inputs.values()))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("name", ["odd", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_kernel_matches_the_compiled_one(name, dtype):
    """What devices without compiled kernels run, here on CPU tensors."""
    from mnp_fast.ops import conv as module

    conv = CONVS[name]
    inputs = conv_inputs(conv, dtype)
    geometry = [list(v) if isinstance(v, tuple) else v for v in conv.geometry.values()]
    args = (*inputs.values(), *geometry, "relu", True)
    y, u = torch.ops.mnp_fast.masked_conv2d(*args)
    for actual, expected in zip(module._default(*args), (y, u), strict=True):
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) <= max(TOLERANCE[dtype], 1e-12)
    vectors = [inputs[v] for v in ("mask", "scale", "shift")]
    args = (torch.randn_like(y), inputs["x"], inputs["weight"], y, u, *vectors, *geometry)
    needs = (True, True, True, True)
    expected = torch.ops.mnp_fast.masked_conv2d_backward(*args, *needs)
    for actual, wanted in zip(module._backward_default(*args, *needs), expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) <= max(2 * TOLERANCE[dtype], 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 3, 7)}, r"x must have shape \(N, C, H, W\), not \(2, 3, 7\)"),
        ({"weight": torch.randn(5, 4, 3, 3)}, "do not fit groups = 1"),
        ({"weight": torch.randn(5, 3, 3, 3).double()}, "share a dtype"),
        ({"weight": torch.randn(0, 3, 3, 3)}, "weight must have shape"),
        ({"weight": torch.randn(5, 3, 30, 3)}, "does not fit a padded input"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(5,\)"),
        ({"mask": torch.ones(3, 5)}, r"per sample, \(2, 5\)"),
        ({"mask": torch.ones(5).double()}, "mask must have the input's dtype"),
        ({"scale": torch.ones(1)}, r"scale must have shape \(5,\)"),
        ({"shift": torch.ones(5, 1)}, "shift must have shape"),
        ({"bias": torch.ones(6)}, "bias must have shape"),
        ({"residual": torch.ones(2, 5, 7, 8)}, "residual must have the output's shape"),
        ({"residual": torch.ones(2, 5, 7, 9).double()}, "residual must have the input's dtype"),
        ({"activation": "tanh"}, "activation must be 'none' or 'relu', not 'tanh'"),
        ({"stride": 0}, "stride must be two positive integers"),
        ({"padding": -1}, "padding must be two non-negative integers"),
        ({"dilation": (1, 0)}, "dilation must be two positive integers"),
        ({"groups": 2}, "do not fit groups = 2"),
        ({"groups": 0}, "do not fit groups = 0"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.randn(2, 3, 7, 9), "weight": torch.randn(5, 3, 3, 3), "padding": 1}
    masked_conv2d(**good)
    with pytest.raises(RuntimeError, match=message):
        masked_conv2d(**{**good, **change})


def test_integers_are_refused():
    with pytest.raises(RuntimeError, match="dtype must be float32"):
        masked_conv2d(torch.ones(1, 1, 3, 3, dtype=torch.int64), torch.ones(1, 1, 1, 1).long())


LINEAR_SHAPES = [(5, 7), (7,), (2, 3, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)]


def linear_problem(shape, neurons, mask):
    """Random tensors, in the mask's dtype, for every argument of masked_linear."""
    dtype = mask.dtype
    return {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(neurons, shape[-1], dtype=dtype),
        "mask": mask,
        **{name: torch.randn(neurons, dtype=dtype) for name in VECTORS[1:]},
        "residual": torch.randn(*shape[:-1], neurons, dtype=dtype),
    }


@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_linear_matches_reference(shape, activation):
    mine = require_grad(linear_problem(shape, 20, random_mask(20)))
    exact = require_grad(mine)
    y = masked_linear(**mine, activation=activation)
    expected_in = {
        k: v[None] if k in ("x", "residual") and len(shape) == 1 else v for k, v in exact.items()
    }
    expected = reference.masked_linear(**expected_in, activation=activation).reshape(y.shape)
    assert relative_error(y, expected) <= 1e-13
    with torch.no_grad():
        assert torch.equal(masked_linear(**mine, activation=activation), y)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert_same_grads(mine, exact, 1e-13)


@pytest.fixture
def no_product(monkeypatch):
    """Torch's product fails: the layer has to do without it."""

    def fail(*_):
        raise AssertionError("torch's product was called")

    monkeypatch.setattr("mnp_fast.ops.linear.F", SimpleNamespace(linear=fail))


MUCH = [((1024, 7), 20), ((1031, 7), 20), ((3, 400, 5), 20), ((2, 3, 200, 5), 20)]
if _C.instruction_set != "baseline":
    MUCH += [((67, 520), 510), ((2, 2900), 2900)]  # fewer rows, with much to multiply


@pytest.mark.parametrize(("shape", "neurons"), MUCH)
@pytest.mark.parametrize("per_sample", [False, True])
def test_much_is_computed_by_the_convolutions_kernel(shape, neurons, per_sample, no_product):
    mask = random_mask(*shape[:1] * per_sample, neurons, dtype=torch.float32)
    inputs = linear_problem(shape, neurons, mask)
    weight = inputs.pop("weight")
    mine = require_grad(inputs)
    exact = require_grad({name: tensor.double() for name, tensor in inputs.items()})
    y = masked_linear(**mine, weight=weight, activation="relu")
    expected = reference.masked_linear(**exact, weight=weight.double(), activation="relu")
    assert y.shape == expected.shape
    assert relative_error(y, expected) <= TOLERANCE[torch.float32]
    with torch.no_grad():
        assert torch.equal(masked_linear(**mine, weight=weight, activation="relu"), y)
    grad = torch.randn_like(y) * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    assert_same_grads(mine, exact, TOLERANCE[torch.float32])


def test_large_frozen_weights_are_computed_by_the_convolutions_kernel(no_product):
    layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    model, exact = wrap(layers, site="filter").requires_grad_(False), layers.double()
    x = torch.randn(3, 512)
    with pytest.raises(AssertionError, match="product"):
        model(x)
    with frozen_weights(model):
        for _ in range(2):
            assert relative_error(model(x), exact(x.double())) <= TOLERANCE[torch.float32]
            with torch.no_grad():
                model[0].weight.mul_(2)
                exact[0].weight.mul_(2)


def test_linear_per_sample_masks():
    x, weight = torch.randn(4, 3, 6).double(), torch.randn(5, 6).double()
    mask = random_mask(4, 5).requires_grad_()
    y = masked_linear(x, weight, mask)
    expected = (x @ weight.T) * mask[:, None]
    assert relative_error(y, expected) <= 1e-13
    (mine,) = torch.autograd.grad(y.square().sum(), mask)
    (exact,) = torch.autograd.grad(expected.square().sum(), mask)
    assert relative_error(mine, exact) <= 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 6)}, "x must have shape"),
        ({"weight": torch.randn(5, 7, 1)}, r"weight \(K, C\)"),
        ({"mask": torch.ones(4)}, "mask must have shape"),
        ({"residual": torch.ones(2, 4)}, "residual must have the output's shape"),
    ],
)
def test_linear_bad_input_is_named(change, message):
    good = {"x": torch.randn(2, 7), "weight": torch.randn(5, 7)}
    masked_linear(**good)
    with pytest.raises(RuntimeError, match=message):
        masked_linear(**{**good, **change})
