"""The kernels on a GPU: python -m pytest -m gpu tests/triton.

Compiling is what takes long: types and layouts take turns, as the interpreter runs all of them.
"""

import pytest
import torch

from mnp_fast import ops, reference
from mnp_fast.triton import conv, kernels
from mnp_fast.triton.conv import masked_conv2d
from mnp_fast.triton.linear import masked_linear

from ..ops.cases import CONVS, Conv, conv_inputs, random_mask, relative_error
from .compare import TOLERANCE, UNGROUPED, as_layout, compare

pytestmark = pytest.mark.gpu

LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYER = Conv(8, 64, 28, 28, 128)


@pytest.fixture(autouse=True)
def _float32_stays_float32():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


def inputs_of(case, dtype, layout=torch.channels_last, per_sample=True):
    inputs = conv_inputs(case, dtype, per_sample=per_sample)
    return as_layout({name: t.cuda() for name, t in inputs.items()}, layout)


def relu(case):
    return {**case.geometry, "activation": "relu"}


def use_configuration(monkeypatch, index):
    for tuner in (*kernels.CONV_FORWARD.values(), *kernels.CONV_GRAD_INPUT.values()):
        monkeypatch.setattr(tuner, "configs", [tuner.configs[index % len(tuner.configs)]])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("index", range(len(UNGROUPED)), ids=UNGROUPED)
def test_matches_reference(index, half):
    case, dtype = CONVS[UNGROUPED[index]], torch.float16 if half else torch.float32
    compare(inputs_of(case, dtype, LAYOUTS[(index + half) % 2]), relu(case))


# Images that are not channels-last have one configuration.
@pytest.mark.parametrize(
    ("layout", "index"), [(LAYOUTS[0], 0), *((LAYOUTS[1], i) for i in range(3))]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_configuration(monkeypatch, dtype, layout, index):
    use_configuration(monkeypatch, index)
    compare(inputs_of(LAYER, dtype, layout), relu(LAYER))


def test_tf32():
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    compare(inputs_of(LAYER, torch.float32), relu(LAYER), tolerance=2e-3)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    list(zip(TOLERANCE, [(3, 5, 9), (64, 512), (4, 197, 192)], strict=True)),
)
def test_linear(monkeypatch, dtype, shape):
    use_configuration(monkeypatch, 2)
    inputs = {
        "x": torch.randn(shape),
        "weight": torch.randn(96, shape[-1]),
        "mask": random_mask(shape[0], 96),
        **{name: torch.randn(96) for name in ("scale", "shift", "bias")},
        "residual": torch.randn(*shape[:-1], 96),
    }
    inputs = {name: t.cuda().to(dtype) for name, t in inputs.items()}
    compare(inputs, {"activation": "relu"}, masked_linear, reference.masked_linear)


def test_repeated_calls_give_the_same_bits():
    def gradients():
        inputs = {name: t.clone().requires_grad_() for name, t in given.items()}
        y = masked_conv2d(**inputs, **relu(LAYER))
        return [y, *torch.autograd.grad(y.sum(), [inputs["x"], inputs["mask"]])]

    given = inputs_of(LAYER, torch.float16)
    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_of_64_bits():
    x = torch.zeros(2**31 // (64 * 64 * 64) + 1, 64, 64, 64, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1].normal_()
    weight = torch.randn(16, 64, 3, 3, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    y = masked_conv2d(x, weight, padding=1)
    expected = reference.masked_conv2d(x[-1:].double(), weight.double(), padding=(1, 1))
    assert relative_error(y[-1:], expected) <= 1e-3


def test_torch_compile():
    inputs = inputs_of(LAYER, torch.float16)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    others = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    compiled = torch.compile(lambda **given: masked_conv2d(**given, **relu(LAYER)), fullgraph=True)
    y, expected = compiled(**leaves), masked_conv2d(**others, **relu(LAYER))
    assert relative_error(y, expected) <= 1e-3
    for result in (y, expected):
        result.sum().backward()
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, others[name].grad) <= 1e-3, name


def test_cuda_graph_and_stream():
    inputs = inputs_of(LAYER, torch.float16)
    masked_conv2d(**inputs, **relu(LAYER))  # compiles and tunes before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_conv2d(**inputs, **relu(LAYER))
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, masked_conv2d(**inputs, **relu(LAYER)))


def test_same_as_the_operators_default_kernel():
    inputs = inputs_of(LAYER, torch.float32)
    assert (
        relative_error(
            masked_conv2d(**inputs, **relu(LAYER)), ops.masked_conv2d(**inputs, **relu(LAYER))
        )
        <= 1e-6
    )
    assert conv.allow_tf32() is False
