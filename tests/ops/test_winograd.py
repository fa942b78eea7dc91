import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mnp_fast import _C
from mnp_fast.ops import masked_conv2d

from .cases import (
    CONVS,
    Conv,
    assert_same_bits,
    conv_inputs,
    random_mask,
    relative_error,
    require_grad,
)
from .test_conv import compare

# float64: 100 times the rounding of a sum of a few hundred products; half types: their own.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
SHAPES = {
    "multiple of the tile": Conv(2, 16, 8, 8, 32),
    "odd": Conv(3, 17, 7, 9, 33),
    "fewer channels than lanes": Conv(2, 3, 6, 5, 5),
    "one channel": Conv(2, 1, 5, 5, 1),
    "one output": Conv(3, 4, 3, 3, 6, padding=(0, 0)),
    "one row": Conv(1, 20, 1, 30, 9),
    "no padding": Conv(2, 24, 9, 10, 20, padding=(0, 0)),
    "uneven padding": Conv(2, 8, 6, 7, 16, padding=(2, 0)),
    "padding 2": Conv(2, 8, 6, 7, 16, padding=(2, 2)),
    "padding beyond the kernel": Conv(2, 5, 4, 4, 6, padding=(4, 3)),
    "more tiles than neurons": Conv(5, 12, 18, 18, 20),
    "more neurons than tiles": Conv(1, 40, 5, 5, 130),
    "many blocks": Conv(7, 70, 21, 13, 50),
    "sums of many tiles": Conv(5, 160, 16, 16, 150),
    "groups": Conv(3, 51, 7, 9, 60, groups=3),
    "groups, many blocks": Conv(7, 32, 21, 13, 48, groups=2),
    "groups, more neurons than tiles": Conv(1, 80, 5, 5, 260, groups=2),
    "groups, more than are transformed together": Conv(2, 150, 7, 9, 60, groups=10),
    "narrow groups": Conv(2, 32, 6, 5, 48, groups=16),
    "dilated": Conv(2, 17, 11, 10, 20, padding=(2, 3), dilation=(2, 3)),
    "dilated beyond the image": Conv(2, 5, 4, 9, 6, padding=(6, 1), dilation=(6, 1)),
    "dilated, in groups, many blocks": Conv(
        5, 48, 19, 13, 30, padding=(0, 2), dilation=(1, 2), groups=2
    ),
    "dilated, more neurons than tiles": Conv(1, 40, 7, 8, 300, padding=(2, 2), dilation=(2, 2)),
    "2x2": Conv(9, 17, 2, 2, 33),
    "2x2, one channel": Conv(1, 1, 2, 2, 1),
    "2x2, more tiles than neurons": Conv(61, 20, 2, 2, 40),
    "2x2, groups": Conv(5, 51, 2, 2, 60, groups=3),
    "2x2, padding 2": Conv(3, 8, 2, 2, 16, padding=(2, 2)),
    "2x2, uneven padding": Conv(3, 8, 2, 2, 16, padding=(1, 2)),
    "2x2 of a larger image": Conv(3, 8, 4, 4, 16, padding=(0, 0)),
    "4x4 dilated to 2x2": Conv(3, 8, 4, 4, 16, padding=(2, 2), dilation=(2, 2)),
    "no samples": Conv(0, 3, 5, 5, 4),
}
STRIDE_2 = {
    f"stride 2, {name}": replace(conv, stride=(2, 2), padding=padding)
    for name, conv, padding in (
        ("multiple of the tile", Conv(2, 16, 16, 16, 32), (1, 1)),
        ("odd", Conv(3, 17, 15, 11, 33), (1, 1)),
        ("one channel", Conv(2, 1, 5, 6, 1), (1, 1)),
        ("one output", Conv(3, 4, 3, 4, 6), (0, 0)),
        ("uneven padding", Conv(2, 8, 6, 9, 16), (1, 3)),
        ("even padding", Conv(2, 8, 6, 9, 16), (1, 2)),
        ("padding beyond the kernel", Conv(2, 5, 4, 4, 6), (5, 3)),
        ("more neurons than tiles", Conv(1, 40, 9, 9, 130), (1, 1)),
        ("many blocks", Conv(7, 70, 33, 25, 50), (1, 1)),
        ("groups", Conv(3, 51, 15, 11, 60, groups=3), (1, 1)),
        ("no samples", Conv(0, 3, 5, 5, 4), (1, 1)),
    )
}
FIVE = {
    f"5x5, {name}": replace(conv, kernel=(5, 5), padding=padding)
    for name, conv, padding in (
        ("multiple of the tile", Conv(2, 16, 8, 8, 32), (2, 2)),
        ("odd", Conv(3, 17, 7, 9, 33), (2, 2)),
        ("one channel", Conv(2, 1, 5, 5, 1), (2, 2)),
        ("one output", Conv(3, 4, 5, 5, 6), (0, 0)),
        ("one row", Conv(1, 20, 1, 30, 9), (2, 2)),
        ("uneven padding", Conv(2, 8, 6, 7, 16), (3, 0)),
        ("padding beyond the kernel", Conv(2, 5, 4, 4, 6), (6, 5)),
        ("more neurons than tiles", Conv(1, 40, 5, 5, 130), (2, 2)),
        ("many blocks", Conv(7, 70, 11, 13, 50), (2, 2)),
        ("groups", Conv(3, 51, 7, 9, 60, groups=3), (2, 2)),
        ("dilated", Conv(2, 17, 13, 12, 20, dilation=(3, 2)), (4, 4)),
        ("no samples", Conv(0, 3, 5, 5, 4), (2, 2)),
    )
}
# With more tiles than neurons, and with fewer.
THREADED = {
    "tiles": Conv(4, 24, 13, 13, 40),
    "neurons": Conv(3, 30, 5, 6, 100),
    "2x2": Conv(90, 30, 2, 2, 100),
    "groups": Conv(4, 48, 13, 13, 72, groups=3),
}
THREADED_STRIDE_2 = {
    f"stride 2, {name}": replace(conv, h=2 * conv.h, w=2 * conv.w, stride=(2, 2))
    for name, conv in THREADED.items()
}
THREADED_FIVE = {
    f"5x5, {name}": replace(conv, kernel=(5, 5), padding=(2, 2)) for name, conv in THREADED.items()
}
# Layers of a ResNet-18 for 32x32 images, and the last one for 16x16.
LAYERS = [
    Conv(2, c, size, size, c) for c, size in ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2))
]
FIVE_LAYERS = [
    Conv(2, c, size, size, c, kernel=(5, 5), padding=(2, 2)) for c, size in ((64, 16), (192, 8))
]
STRIDE_2_LAYERS = [
    Conv(2, c, size, size, 2 * c, stride=(2, 2)) for c, size in ((64, 32), (128, 16), (256, 8))
]


def cases(algorithm, shapes):
    return [pytest.param(algorithm, shapes[name], id=f"{algorithm}-{name}") for name in shapes]


each_case = pytest.mark.parametrize(
    ("algorithm", "conv"),
    [*cases("winograd2", SHAPES | STRIDE_2), *cases("winograd4", SHAPES | STRIDE_2 | FIVE)],
)
each_odd_case = pytest.mark.parametrize(
    ("algorithm", "conv"),
    [
        *cases("winograd2", {n: (SHAPES | STRIDE_2)[n] for n in ("odd", "stride 2, odd")}),
        *cases(
            "winograd4",
            {n: (SHAPES | STRIDE_2 | FIVE)[n] for n in ("odd", "stride 2, odd", "5x5, odd")},
        ),
    ],
)
# Bounds of the relative error in float32, as documented.
ERRORS = {"direct": 1e-6, "winograd2": 1e-6, "winograd4": 1e-5}


@pytest.fixture(params=["winograd2", "winograd4"])
def algorithm(request):
    return request.param


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@each_case
def test_matches_reference_in_float64(conv, activation, per_sample, algorithm):
    compare(conv_inputs(conv, per_sample=per_sample), conv, activation, 1e-13, algorithm)


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_case
def test_every_dtype(conv, dtype, algorithm):
    compare(conv_inputs(conv, dtype, True), conv, "relu", TOLERANCE[dtype], algorithm)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_shapes(dtype, seed, algorithm):
    torch.manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    kinds = ((3, 1), (3, 2), (5, 1)) if algorithm == "winograd4" else ((3, 1), (3, 2))
    for edge, stride in kinds * (12 // len(kinds)):
        conv = Conv(
            n=draw(1, 5),
            c=draw(1, 70),
            h=draw(5, 20),
            w=draw(5, 20),
            k=draw(1, 90),
            kernel=(edge, edge),
            stride=(stride, stride),
            padding=(draw(0, 2), draw(0, 2)),
        )
        inputs = conv_inputs(conv, dtype, per_sample=bool(draw(0, 1)))
        compare(inputs, conv, "relu", TOLERANCE[dtype], algorithm)


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        *((name, conv) for name in ERRORS for conv in LAYERS + STRIDE_2_LAYERS),
        *((name, conv) for name in ("direct", "winograd4") for conv in FIVE_LAYERS),
    ],
    ids=str,
)
def test_error_at_the_layers_it_is_for(name, conv):
    """The documented bounds hold for sums of up to 4608 products, forward and backward."""
    compare(conv_inputs(conv, torch.float32), conv, "relu", ERRORS[name], name)


@pytest.mark.parametrize("conv", LAYERS + STRIDE_2_LAYERS, ids=str)
def test_error_of_weight_gradients(conv):
    """The bounds hold for sums over a batch of 32, of up to 32768 products."""
    weight = torch.randn(conv.k, conv.c, 3, 3, requires_grad=True)
    exact = weight.detach().double().requires_grad_()
    x = torch.randn(32, conv.c, conv.h, conv.w)
    y = F.conv2d(x.double(), exact, stride=conv.stride, padding=conv.padding)
    grad = torch.randn(y.shape)
    (expected,) = torch.autograd.grad(y, exact, grad.double())
    for name, bound in ERRORS.items():
        y = masked_conv2d(x, weight, **conv.geometry, algorithm=name)
        (actual,) = torch.autograd.grad(y, weight, grad)
        assert relative_error(actual, expected) <= bound, name


@each_odd_case
@pytest.mark.parametrize("given", ["mask", "scale", "shift", "bias", "residual", None])
def test_one_vector_alone(given, conv, algorithm):
    inputs = conv_inputs(conv)
    for name in ("mask", "scale", "shift", "bias", "residual"):
        if name != given:
            inputs[name] = None
    compare(inputs, conv, "relu", 1e-13, algorithm)


@each_odd_case
def test_masked_neurons_leave_the_bias_exactly(conv, algorithm):
    inputs = conv_inputs(conv, torch.float32)
    inputs["residual"] = None
    inputs["mask"] = random_mask(conv.k, dtype=torch.float32)
    y = masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    off = inputs["mask"] == 0
    assert off.any()
    assert torch.equal(y[:, off], inputs["bias"][off].view(1, -1, 1, 1).expand_as(y[:, off]))


@each_odd_case
def test_inputs_of_any_stride(conv, algorithm):
    inputs = conv_inputs(conv)
    expected = masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    strided = {
        "x": inputs["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "weight": inputs["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "residual": inputs["residual"].repeat_interleave(2, dim=3)[..., ::2],
        **{v: inputs[v].repeat_interleave(3)[::3] for v in ("mask", "scale", "shift", "bias")},
    }
    assert not any(t.is_contiguous() for t in strided.values())
    y = masked_conv2d(**strided, **conv.geometry, algorithm=algorithm)
    assert torch.equal(y, expected)


@each_odd_case
@pytest.mark.parametrize("channels_last", [(True, False), (False, True), (True, True)])
def test_channels_last(channels_last, conv, algorithm):
    inputs = conv_inputs(conv)
    for name, last in zip(("x", "weight"), channels_last, strict=True):
        if last:
            inputs[name] = inputs[name].to(memory_format=torch.channels_last)
    compare(inputs, conv, "relu", 1e-13, algorithm)
    y = masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last[0]


@pytest.mark.parametrize(
    ("algorithm", "conv"),
    [
        ("winograd2", Conv(2, 3, 5, 6, 4, padding=(0, 1))),
        ("winograd4", Conv(2, 3, 5, 6, 4, padding=(0, 1))),
        ("winograd2", Conv(2, 3, 7, 6, 4, stride=(2, 2), padding=(1, 1))),
        ("winograd4", Conv(2, 3, 7, 6, 4, stride=(2, 2), padding=(1, 1))),
        ("winograd4", Conv(2, 3, 5, 6, 4, kernel=(5, 5), padding=(1, 3))),
    ],
    ids=str,
)
def test_gradcheck(conv, algorithm):
    inputs = require_grad(conv_inputs(conv))
    torch.autograd.gradcheck(
        lambda *args: masked_conv2d(*args, **conv.geometry, activation="relu", algorithm=algorithm),
        tuple(inputs.values()),
    )


@each_odd_case
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last, conv, algorithm):
    inputs = conv_inputs(conv, torch.float32)
    if channels_last:
        inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    inputs = require_grad(inputs)
    geometry = [list(v) if isinstance(v, tuple) else v for v in conv.geometry.values()]
    args = (*inputs.values(), *geometry, "relu", True, algorithm)
    torch.library.opcheck(torch.ops.mnp_fast.masked_conv2d.default, args)


@pytest.mark.parametrize(
    ("algorithm", "conv"),
    [
        *cases("winograd2", THREADED | THREADED_STRIDE_2),
        *cases("winograd4", THREADED | THREADED_STRIDE_2),
        *cases("winograd4", THREADED_FIVE),
    ],
)
def test_same_bits_whatever_the_number_of_threads(conv, algorithm):
    inputs = require_grad(conv_inputs(conv, torch.float32))

    def compute():
        y = masked_conv2d(**inputs, **conv.geometry, activation="relu", algorithm=algorithm)
        return y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))

    assert_same_bits(compute, (1, 2, 3, 5))


@pytest.mark.parametrize(
    ("algorithm", "conv"),
    [
        ("winograd2", Conv(9, 24, 9, 9, 40)),
        ("winograd4", Conv(9, 24, 9, 9, 40)),
        ("winograd2", Conv(9, 24, 17, 17, 40, stride=(2, 2))),
        ("winograd4", Conv(9, 24, 17, 17, 40, stride=(2, 2))),
        ("winograd4", Conv(9, 24, 9, 9, 40, kernel=(5, 5), padding=(2, 2))),
    ],
    ids=str,
)
def test_a_sample_does_not_depend_on_its_neighbours(conv, algorithm):
    inputs = conv_inputs(conv, torch.float32)
    whole = masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    inputs["x"], inputs["residual"] = inputs["x"][4:5], inputs["residual"][4:5]
    assert torch.equal(masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm), whole[4:5])


def test_auto_follows_shape_and_dtype():
    def chosen(conv, dtype=torch.float32):
        """For the output and for the gradients of input and weight."""
        inputs = conv_inputs(conv, dtype)
        x, weight = (inputs[name].requires_grad_() for name in ("x", "weight"))
        names = ["auto", "direct"]
        names += ["winograd4"] * (conv.kernel != (1, 1)) + ["winograd2"] * (conv.kernel == (3, 3))
        results, torchs = {}, {}
        for name in names:
            y = masked_conv2d(**inputs, **conv.geometry, algorithm=name)
            with torch.profiler.profile() as calls:
                results[name] = y, *torch.autograd.grad(y.sum(), (x, weight))
            torchs[name] = "aten::convolution_backward" in {call.key for call in calls.events()}
        assert not any(torchs[name] for name in names[1:])
        for i, (auto, *others) in enumerate(zip(*results.values(), strict=True)):
            if torchs["auto"] and i == 2:
                yield "torch"
                return
            # Gradients of 5x5 weights, and of those of groups, are direct whatever the name; with
            # stride 2 they have no winograd2.
            same = [i for i, other in enumerate(others) if torch.equal(auto, other)]
            plain = conv.kernel == (3, 3) and conv.stride == (1, 1) and conv.groups == 1
            assert len(same) == 1 or (same and not plain)
            yield names[1 + same[0]]

    assert [*chosen(LAYERS[0])] == ["winograd4"] * 3
    assert [*chosen(STRIDE_2_LAYERS[0])] == ["direct", "direct", "winograd4"]
    assert [*chosen(STRIDE_2["stride 2, one channel"])] == ["direct"] * 3
    assert [*chosen(LAYERS[0], torch.float64)] == ["direct"] * 3
    assert [*chosen(Conv(2, 3, 7, 7, 5))] == ["direct"] * 3
    assert [*chosen(SHAPES["one row"])] == ["direct"] * 3
    assert [*chosen(Conv(8, 64, 2, 2, 64))] == ["winograd2", "winograd2", "direct"]
    assert [*chosen(Conv(1, 64, 2, 2, 64))] == ["winograd2", "winograd2", "direct"]
    assert [*chosen(Conv(1, 64, 2, 3, 64))] == ["direct"] * 3
    assert [*chosen(Conv(2, 64, 6, 6, 8))] == ["winograd2", "direct", "torch"]
    assert [*chosen(Conv(1, 12, 12, 12, 20))] == ["winograd4", "winograd4", "torch"]
    assert [*chosen(FIVE_LAYERS[0])] == ["winograd4", "winograd4", "direct"]
    assert [*chosen(FIVE["5x5, one channel"])] == ["direct"] * 3
    assert [*chosen(Conv(2, 64, 16, 16, 64, groups=4))] == ["winograd4", "winograd4", "torch"]
    assert [*chosen(Conv(2, 32, 16, 16, 32, groups=4))] == ["direct", "direct", "torch"]
    assert [*chosen(Conv(2, 64, 16, 16, 64, stride=(2, 2), groups=4))] == [
        "direct",
        "direct",
        "torch",
    ]
    assert [*chosen(Conv(8, 16, 16, 16, 32, stride=(2, 2)))] == ["direct", "direct", "torch"]
    assert [*chosen(Conv(8, 20, 16, 16, 20))][2:] == ["winograd4"]
    assert [*chosen(Conv(16, 64, 8, 8, 64, kernel=(1, 1), padding=(0, 0)))][2:] == ["direct"]
    assert [*chosen(Conv(17, 64, 8, 8, 64, kernel=(1, 1), padding=(0, 0)))][2:] == ["torch"]
    assert [*chosen(Conv(8, 128, 28, 28, 64, stride=(2, 2)))] == [
        "winograd2",
        "direct",
        "winograd4",
    ]
    assert [*chosen(Conv(8, 128, 28, 28, 256, stride=(2, 2)))][:2] == ["winograd2"] * 2
    assert [*chosen(Conv(8, 64, 32, 32, 128, stride=(2, 2)))] == ["winograd4"] * 3


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        *(
            (algorithm, name)
            for algorithm in ("winograd2", "winograd4")
            for name in ("1x1", "dilated, stride 2", "5x5 stride 2", "stride 3", "stride 1x2")
        ),
        ("winograd2", "5x5"),
    ],
)
def test_shapes_it_cannot_compute_are_refused(name, algorithm):
    conv = {
        **CONVS,
        "dilated, stride 2": Conv(1, 3, 9, 9, 4, stride=(2, 2), dilation=(2, 2)),
        "stride 3": Conv(1, 3, 7, 7, 4, stride=(3, 3)),
        "stride 1x2": Conv(1, 3, 7, 7, 4, stride=(1, 2)),
        "5x5": Conv(1, 3, 7, 7, 4, kernel=(5, 5)),
        "5x5 stride 2": Conv(1, 3, 7, 7, 4, kernel=(5, 5), stride=(2, 2)),
    }[name]
    inputs = conv_inputs(conv, torch.float32)
    with pytest.raises(RuntimeError, match=rf"'{algorithm}' needs a 3x3 kernel with stride 1"):
        masked_conv2d(**inputs, **conv.geometry, algorithm=algorithm)
    masked_conv2d(**inputs, **conv.geometry)


def test_unknown_algorithms_are_refused():
    with pytest.raises(RuntimeError, match="algorithm must be 'auto', 'direct', 'winograd2' or"):
        masked_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), algorithm="fft")


@each_odd_case
def test_compiles_without_graph_breaks(conv, algorithm):
    inputs = require_grad(conv_inputs(conv, torch.float32))

    def loss(**tensors):
        y = masked_conv2d(**tensors, **conv.geometry, activation="relu", algorithm=algorithm)
        return y.square().sum()

    expected = torch.autograd.grad(loss(**inputs), list(inputs.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**inputs), list(inputs.values()))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-6


OTHER_SETS = [name for name in _C.instruction_sets_usable if name != _C.instruction_set]


@pytest.mark.parametrize("instruction_set", OTHER_SETS)
def test_every_instruction_set(instruction_set):
    """The tests above, which run the set in use, once more in a process that runs another one."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not every_instruction_set"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env={**os.environ, "MNP_FAST_CPU": instruction_set},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
