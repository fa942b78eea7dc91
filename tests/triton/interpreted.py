"""The kernels run by Triton's interpreter on the CPU. test_interpreter.py runs this file in a
process of its own, with TRITON_INTERPRET=1: Triton reads the variable once, when it is imported.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mnp_fast import reference
from mnp_fast.triton import conv, kernels
from mnp_fast.triton.conv import masked_conv2d
from mnp_fast.triton.linear import masked_linear

from ..ops.cases import (
    CONVS,
    VECTORS,
    Conv,
    assert_same_grads,
    conv_inputs,
    random_mask,
    relative_error,
    require_grad,
)
from .compare import TOLERANCE, UNGROUPED, as_layout, compare

MARGIN = 2048  # elements before and after every buffer
SMALL = triton.Config({"ROWS": 32, "COLUMNS": 16, "TERMS": 16})  # several tiles even in small cases
TUNERS = [*kernels.CONV_FORWARD.values(), *kernels.CONV_GRAD_INPUT.values()]


class Guards:
    """Puts tensors between margins, and looks at the margins again.

    Margins of inputs are NaN, which reaches whatever is made of them; those of outputs are not, so
    that a NaN stored there is seen. Outputs are NaN before they are written.
    """

    def __init__(self) -> None:
        self.margins: list[tuple[Tensor, float]] = []

    def empty(self, like: Tensor, sizes: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        poisoned = torch.full(sizes, torch.nan, dtype=dtype).to(memory_format=layout)
        return self.place(poisoned, margin=1024.0)

    def place(self, t: Tensor, margin: float = torch.nan) -> Tensor:
        """A copy in a buffer of its own, with the same strides."""
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        span = span if t.numel() else 0
        buffer = torch.full((span + 2 * MARGIN,), margin, dtype=t.dtype)
        self.margins += [(buffer[:MARGIN], margin), (buffer[MARGIN + span :], margin)]
        return buffer.as_strided(t.shape, t.stride(), MARGIN).copy_(t)

    def check(self) -> None:
        for values, margin in self.margins:
            whole = torch.full_like(values, margin)
            assert torch.equal(values.nan_to_num(0.5), whole.nan_to_num(0.5)), "a store outside"


def dot_of_values(builder, a, b, *others):
    """The interpreter's product, which takes bfloat16's bits for integers, given their values."""

    def values(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return CREATE_DOT(builder, values(a), values(b), *others)


CREATE_DOT = InterpreterBuilder.create_dot


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of_values)
    guards = Guards()
    monkeypatch.setattr(conv, "_empty", guards.empty)
    monkeypatch.setattr(conv, "_CHUNK", 32)  # several chunks, of several steps, in small cases
    monkeypatch.setattr(conv, "_ROWS", 16)
    for tuner in TUNERS:
        monkeypatch.setattr(tuner, "configs", [SMALL])
    yield guards
    guards.check()


@pytest.fixture
def place(guards):
    return guards.place


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", UNGROUPED)
def test_matches_reference(place, name, layout):
    case = CONVS[name]
    # One layout with masks per sample and ReLU, the other without.
    last = layout == torch.channels_last
    inputs = as_layout(conv_inputs(case, torch.float32, per_sample=last), layout)
    compare(inputs, {**case.geometry, "activation": "relu" if last else "none"}, place=place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "uneven", "1x1"])
def test_half_types(place, name, dtype):
    case = CONVS[name]
    compare(conv_inputs(case, dtype), {**case.geometry, "activation": "relu"}, place=place)


CONFIGURATIONS = {tuner: tuner.configs for tuner in TUNERS}


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_configuration(place, monkeypatch, dtype, index):
    case = Conv(2, 16, 9, 8, 32, stride=(2, 1))
    for tuner, configs in CONFIGURATIONS.items():
        monkeypatch.setattr(tuner, "configs", [configs[index % len(configs)]])
    inputs = conv_inputs(case, dtype, per_sample=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        compare(as_layout(inputs, layout), {**case.geometry, "activation": "relu"}, place=place)


@pytest.mark.parametrize("present", [(), ("mask",), ("shift", "bias"), ("scale", "residual")])
def test_subsets_of_vectors(place, present):
    case = CONVS["1x1"]
    inputs = conv_inputs(case, torch.float32)
    for name in (*VECTORS, "residual"):
        if name not in present:
            inputs[name] = None
    for activation in ("none", "relu"):
        compare(inputs, {**case.geometry, "activation": activation}, place=place)


@pytest.mark.parametrize("wanted", ["x", "weight", "mask", "residual"])
def test_gradient_of_one_input_alone(place, wanted):
    case = CONVS["odd"]
    inputs = conv_inputs(case, torch.float32)
    exact = {k: v.double().requires_grad_(k == wanted) for k, v in inputs.items()}
    inputs = {k: place(v).requires_grad_(k == wanted) for k, v in inputs.items()}
    y = masked_conv2d(**inputs, **case.geometry, activation="relu")
    expected = reference.masked_conv2d(**exact, **case.geometry, activation="relu")
    grad = torch.randn_like(y) * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    assert relative_error(inputs[wanted].grad, exact[wanted].grad) <= 1e-6
    assert all(t.grad is None for name, t in inputs.items() if name != wanted)


def test_inputs_of_any_stride():
    case = CONVS["3x3"]
    inputs = conv_inputs(case, torch.float32)
    strided = {
        "x": inputs["x"].transpose(2, 3).contiguous().transpose(2, 3),
        "weight": inputs["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "residual": inputs["residual"].repeat_interleave(2, dim=3)[..., ::2],
        **{name: inputs[name].repeat_interleave(3)[::3] for name in VECTORS},
    }
    assert not any(t.is_contiguous() for t in strided.values())
    mine, exact = require_grad(strided), require_grad({k: v.double() for k, v in inputs.items()})
    y = masked_conv2d(**mine, **case.geometry)
    expected = reference.masked_conv2d(**exact, **case.geometry)
    assert relative_error(y, expected) <= 1e-6
    for result in (y, expected):
        result.backward(torch.ones((), dtype=result.dtype).expand_as(result))
    assert_same_grads(mine, exact, 1e-6)


def test_offsets_of_64_bits():
    case = Conv(2, 3, 5, 4, 6)
    inputs = conv_inputs(case, torch.float32)
    # Pages that nothing touches take no memory.
    far = torch.empty(2**31 + inputs["x"].numel(), dtype=torch.float32)
    x = far.as_strided((2, 3, 5, 4), (2**31, 1, 12, 3)).copy_(inputs["x"]).requires_grad_()
    exact = inputs["x"].double().requires_grad_()
    y = masked_conv2d(x, inputs["weight"], **case.geometry)
    expected = reference.masked_conv2d(exact, inputs["weight"].double(), **case.geometry)
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(y, expected) <= 1e-6
    assert relative_error(x.grad, exact.grad) <= 1e-6


def test_all_kernels_with_64_bits(place, monkeypatch):
    monkeypatch.setattr(conv, "_wide", lambda *tensors: True)
    case = CONVS["stride2"]
    inputs = conv_inputs(case, torch.float32, per_sample=True)
    compare(inputs, {**case.geometry, "activation": "relu"}, place=place)


def test_nan_is_not_hidden():
    x = torch.full((1, 2, 3, 3), torch.nan)
    y = masked_conv2d(x, torch.ones(2, 2, 1, 1), activation="relu")
    assert y.isnan().all()


@pytest.mark.parametrize("shape", [(7, 9), (3, 5, 9), (2, 3, 2, 9), (9,)])
def test_linear(place, shape):
    outputs = (*shape[:-1], 21)
    inputs = {
        "x": torch.randn(shape),
        "weight": torch.randn(21, 9),
        "mask": random_mask(shape[0], 21).float() if len(shape) > 1 else random_mask(21).float(),
        **{name: torch.randn(21) for name in VECTORS[1:]},
        "residual": torch.randn(outputs),
    }
    definition = reference.masked_linear
    if len(shape) == 1:  # the reference wants a batch

        def definition(x, *, residual, **others):
            return reference.masked_linear(x[None], residual=residual[None], **others)[0]

    compare(inputs, {"activation": "relu"}, masked_linear, definition, place)


def test_autocast():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_conv2d(x, weight).dtype == torch.bfloat16
        assert masked_linear(x, torch.randn(4, 5)).dtype == torch.bfloat16


ONES = {"x": torch.ones(2, 3, 5, 5), "weight": torch.ones(4, 3, 3, 3)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(3, 5, 5)}, "x must have shape"),
        ({"weight": torch.ones(4, 2, 3, 3)}, "weight (K, C, kh, kw), not"),
        ({"weight": torch.ones(4, 3, 7, 3)}, "weight of shape (4, 3, 7, 3) does not fit"),
        ({"weight": torch.ones(4, 3, 3, 3).half()}, "must share a dtype"),
        ({"x": torch.ones(2, 3, 5, 5).double()}, "dtype must be one of float32, float16, bfloat16"),
        ({"groups": 3}, "groups must be 1, not 3"),
        ({"mask": torch.ones(3, 4)}, "mask must have shape (4,) or (2, 4), not (3, 4)"),
        ({"scale": torch.ones(5)}, "scale must have shape (4,), not (5,)"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, "bias must be floating-point"),
        ({"shift": torch.ones(4, device="meta")}, "shift must be floating-point and on cpu"),
        ({"residual": torch.ones(2, 4, 3, 1)}, "residual must have shape (2, 4, 3, 3)"),
        ({"stride": 0}, "stride must be two integers of at least 1, not (0, 0)"),
        ({"padding": (1, -1)}, "padding must be two integers of at least 0"),
        ({"stride": 300}, "stride must have a product of at most 65535"),
        ({"activation": "gelu"}, "activation must be 'none' or 'relu', not 'gelu'"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(RuntimeError) as error:
        masked_conv2d(**{**ONES, **changed})
    assert message in str(error.value)


def test_backward_checks_what_it_is_given():
    y = torch.ones(2, 4, 3, 3)
    given = dict(zip(("grad", "x", "weight", "y", "u"), (y, *ONES.values(), y, y), strict=True))
    rest = (None, None, None, [1, 1], [0, 0], [1, 1], 1, True, False, True, True, False)
    for name in ("grad", "y", "u"):
        wrong = {**given, name: torch.ones(2, 4, 3, 2)}
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            torch.ops.mnp_fast.triton_masked_conv2d_backward(*wrong.values(), *rest)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = masked_conv2d(x, torch.randn(2, 2, 1, 1))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated a second time"):
        grad.sum().backward()


# What is broken, where it occurs in kernels.py, and what stands there instead.
MUTANTS = {
    "rows above the image": ("(r >= 0) & ", ""),
    "rows below the image": ("(r < height) & ", ""),
    "columns left of the image": ("(c >= 0) & ", ""),
    "columns right of the image": (" & (c < width)", ""),
    "channels behind the last": ("inside[:, None] & valid_term[None, :]", "inside[:, None]"),
    "weights behind the last": ("valid_term[:, None] & valid_column", "valid_column"),
    "dilation of columns": ("tap_column * column_step", "tap_column"),
    "tap of the weight": ("tap_row * weight_row + ", ""),
    "last sample": ("valid = sample < batch\n", "valid = sample <= batch\n"),
    "last neuron": ("neurons\n    valid_tile", "neurons + 1\n    valid_tile"),
    "padding": ("% out_width) * stride_column - padding_column", "% out_width) * stride_column"),
    "second half of a tile": ("half * (COLUMNS // 2) + ", ""),
    "residual's stride": ("wide_neuron * residual_neuron", "wide_neuron"),
    "sample's mask": ("(sample * neurons)[:, None]", "(sample * 0)[:, None]"),
    "class of pixels": ("stride == 0, tap, first", "stride != 0, tap, first"),
    "direction of taps": ("-(tap_step_row", "(tap_step_row"),
    "rows of a class": (" & (row < height)", ""),
    "pixels of a sample": ("pixel < pixels", "pixel <= pixels"),
    "pixels of a chunk": ("chunk * CHUNK + start", "chunk * CHUNK"),
    "ReLU at 0": ("other=0.0) <= 0, 0.0, d", "other=0.0) < 0, 0.0, d"),
    "place of a chunk's sums": ("chunk.to(INDEX) * (3 * plane)", "chunk.to(INDEX) * plane"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(monkeypatch, tmp_path, mutant):
    text = Path(kernels.__file__).read_text()
    old, new = MUTANTS[mutant]
    assert text.count(old) == 1
    file = tmp_path / "mutant.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for tuner in (*module.CONV_FORWARD.values(), *module.CONV_GRAD_INPUT.values()):
        tuner.configs = [SMALL]
    monkeypatch.setattr(conv, "kernels", module)
    with pytest.raises(AssertionError):
        run_cases(monkeypatch)


def test_the_mutants_cases_pass_unbroken(monkeypatch):
    run_cases(monkeypatch)


def run_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that between them meet every mutant."""
    layouts = itertools.cycle([torch.channels_last, torch.contiguous_format])
    for name in ("odd", "uneven", "stride2"):
        guards = Guards()
        monkeypatch.setattr(conv, "_empty", guards.empty)
        inputs = as_layout(conv_inputs(CONVS[name], torch.float32, per_sample=True), next(layouts))
        compare(inputs, {**CONVS[name].geometry, "activation": "relu"}, place=guards.place)
        guards.check()
