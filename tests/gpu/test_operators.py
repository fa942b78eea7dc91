"""The operators on a CUDA device: pytest -m gpu."""

from contextlib import contextmanager

import pytest
import torch

from mnp_fast import backends, ops, reference

from ..ops.cases import CONVS, assert_same_grads, conv_inputs, relative_error, require_grad
from ..ops.test_affine import SHAPES, TOLERANCE, affine_inputs, compare
from ..ops.test_update import lists

pytestmark = pytest.mark.gpu
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def on_device(inputs):
    return {name: None if t is None else t.cuda() for name, t in inputs.items()}


@contextmanager
def no_waiting():
    """An operation that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_kernels_are_taken():
    x = torch.randn(2, 3, device="cuda")
    assert backends.reasons("masked_affine", x)["cuda"] is None


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 64, 32, 32), (2, 3, 300, 300), (3, 1032, 5, 5)])
def test_affine_matches_reference(shape, dtype, per_sample):
    inputs = on_device(affine_inputs(shape, dtype, per_sample))
    compare(inputs, "relu", 2 * TOLERANCE[dtype])
    if len(shape) == 4:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
        compare(inputs, "relu", 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONVS)
def test_conv_matches_reference(name, dtype, layout):
    conv = CONVS[name]
    inputs = on_device(conv_inputs(conv, dtype))
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    mine = require_grad(inputs)
    exact = require_grad({k: v.double() for k, v in inputs.items()})
    y = ops.masked_conv2d(**mine, **conv.geometry, activation="relu")
    expected = reference.masked_conv2d(**exact, **conv.geometry, activation="relu")
    limit = max(4 * TOLERANCE[dtype], 1e-5 if dtype == torch.float32 else 0)
    assert relative_error(y, expected) <= limit
    grad = torch.randn_like(expected).to(dtype) * ((y > 0) == (expected > 0))
    y.backward(grad)
    expected.backward(grad.double())
    assert_same_grads(mine, exact, 2 * limit)


def test_opcheck():
    inputs = on_device(affine_inputs((2, 6, 5, 4), torch.float32))
    tensors = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.mnp_fast.masked_affine.default, (*tensors, "relu"))
    conv = CONVS["odd"]
    tensors = [t.requires_grad_() for t in on_device(conv_inputs(conv, torch.float32)).values()]
    geometry = [list(v) if isinstance(v, tuple) else v for v in conv.geometry.values()]
    arguments = (*tensors, *geometry, "relu", True)
    torch.library.opcheck(torch.ops.mnp_fast.masked_conv2d.default, arguments)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_magnitude_matches_reference(norm):
    shapes = [(64, 3, 3, 3), (1, 1), (10, 512), (7, 5001), (512, 512, 3, 3)] * 15
    weights = [torch.randn(shape, device="cuda") for shape in shapes]
    weights[5] = weights[5].half()
    with no_waiting():
        norms = ops.neuron_magnitude(weights, norm)
    exact = reference.neuron_magnitude([w.double() for w in weights], norm)
    for mine, expected in zip(norms, exact, strict=True):
        assert relative_error(mine, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_update_matches_reference(dtype):
    mine = [[t.cuda() for t in tensors] for tensors in lists(dtype, (3, 70, 1000) * 30)]
    theirs = [[t.clone() for t in tensors] for tensors in mine]
    with no_waiting():
        ops.mask_update_(*mine, lr=0.1, momentum=0.9, penalty=0.3)
    reference.mask_update_(*theirs, 0.1, 0.9, 0.3)
    for changed, expected in zip(mine[0] + mine[2], theirs[0] + theirs[2], strict=True):
        torch.testing.assert_close(changed, expected)


def step(inputs, conv):
    """A mask step: forward, backward, update."""
    leaves = {"mask": inputs["mask"].detach().requires_grad_()}
    y = ops.masked_conv2d(**{**inputs, **leaves}, **conv.geometry, activation="relu")
    (grad,) = torch.autograd.grad(y.float().square().sum(), leaves["mask"])
    zero = torch.zeros_like(grad)
    ops.mask_update_([inputs["mask"]], [grad], [zero], [zero], lr=0.01)
    return y.detach()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_graphs(dtype, layout):
    """A step is captured once and replayed on other inputs."""
    conv = CONVS["3x3"]
    inputs = on_device(conv_inputs(conv, dtype))
    inputs["mask"] = inputs["mask"].float()
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    start = inputs["mask"].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, conv)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(inputs, conv)
    inputs["x"].normal_()
    inputs["mask"].copy_(start)
    graph.replay()
    replayed = y.clone(), inputs["mask"].clone()
    inputs["mask"].copy_(start)
    expected = step(inputs, conv), inputs["mask"]
    torch.testing.assert_close(replayed, expected)


def test_streams():
    """Kernels run on torch's current stream: work on another one is not waited for."""
    inputs = on_device(affine_inputs((64, 256, 32, 32), torch.float32))
    expected = reference.masked_affine(**inputs)
    x, inputs["x"] = inputs["x"], torch.zeros_like(inputs["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), no_waiting():
        torch.cuda._sleep(50_000_000)
        inputs["x"].copy_(x)
        y = ops.masked_affine(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_same_bits_each_time(layout):
    inputs = on_device(affine_inputs((32, 64, 56, 56), torch.float32))
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    results = []
    for _ in range(3):
        mine = require_grad(inputs)
        ops.masked_affine(**mine, activation="relu").square().sum().backward()
        results.append([t.grad for t in mine.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_more_elements_than_32_bits_count(layout):
    """Elements behind the 2**31st are as those in front."""
    shape = (2**13 + 3, 65, 64, 64)
    needed = 6 * 2 * torch.Size(shape).numel()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=layout).normal_()
    mask = torch.rand(shape[1], device="cuda", requires_grad=True)
    y = ops.masked_affine(x, mask, activation="relu")
    last = slice(shape[0] - 2, None)
    expected = reference.masked_affine(x[last].float(), mask, activation="relu")
    torch.testing.assert_close(y[last].float(), expected, rtol=1e-3, atol=1e-3)
    grad = torch.zeros_like(y)
    grad[last] = 1
    y.backward(grad)
    exact = (x[last].double() * (expected > 0)).sum((0, 2, 3))
    torch.testing.assert_close(mask.grad.double(), exact, rtol=1e-4, atol=1e-2)
