"""The kernels move what docs/gpu.md says, by accesses of 16 bytes: counted as they run."""

import pytest
import torch

from benchmarks.roofline import epilogue_bytes, gradient_bytes

from .cases import computed, laid_out
from .shim import ELEMENTS, Buffer, Call, execute

SHAPE = (2, 24, 80)  # rows and channels are whole vectors, of every type
SPLIT = (1, 8, 4000)  # pixels that several blocks share, whose sums are added


def done_by(program, kernel, ints, buffers, floats=()):
    return execute(program, [Call(kernel, ints, buffers, list(floats))], reverse=False)[0]


def moved(done):
    return 16 * (done.wide_reads + done.wide_writes)


def images(shape, dtype, channels_last, count):
    return [Buffer(laid_out(torch.randn(shape).to(dtype), channels_last)) for _ in range(count)]


def ints_of(shape, dtype, channels_last):
    per_sample, wide, relu = False, False, True
    return [*shape, channels_last, ELEMENTS[dtype], per_sample, wide, relu]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_epilogue(program, dtype, channels_last):
    u, residual, y = images(SHAPE, dtype, channels_last, 3)
    y.role = "out"
    vectors = [Buffer(torch.randn(SHAPE[1]).to(dtype)) for _ in range(4)]
    buffers = [u, *vectors, residual, y]
    done = done_by(program, "epilogue", ints_of(SHAPE, dtype, channels_last), buffers)
    assert moved(done) == epilogue_bytes(u.tensor.numel(), dtype.itemsize)
    assert done.wide_reads == 2 * done.wide_writes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("shape", [SHAPE, SPLIT])
def test_epilogue_grad(program, shape, dtype, channels_last):
    n, k, _ = shape
    grad, y, u, dz, g = images(shape, dtype, channels_last, 5)
    dz.role = g.role = "out"
    vectors = [Buffer(torch.randn(k).to(dtype)) for _ in range(3)]
    sums = Buffer(torch.empty(3, n, k, dtype=computed(dtype)), "out")
    buffers = [grad, y, u, *vectors, dz, g, sums]
    done = done_by(program, "epilogue_grad", ints_of(shape, dtype, channels_last), buffers)
    images_alone = gradient_bytes(u.tensor.numel(), dtype.itemsize)
    added = moved(done) - images_alone
    if channels_last and shape == SPLIT:
        sums_size = sums.tensor.numel() * sums.tensor.element_size()
        parts = added / sums_size - 1  # what is added, once read, and the sums, written
        assert parts == int(parts) > 1
        assert added < images_alone / 20
    else:
        assert added == 0


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_magnitude(program, dtype):
    rows = torch.randn(3, 160).to(dtype)
    norms = Buffer(torch.empty(3, dtype=computed(dtype)), "out")
    done = done_by(program, "magnitude", [ELEMENTS[dtype], 0, 3, 160, 160], [Buffer(rows), norms])
    assert moved(done) == rows.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_update(program, dtype):
    roles = ("inout", "in") * 2
    buffers = [Buffer(torch.rand(64, dtype=dtype), role) for role in roles]
    done = done_by(program, "mask_update", [ELEMENTS[dtype], 64], buffers, (0.1, 0.9, 0.3))
    assert moved(done) == 6 * 64 * dtype.itemsize
    assert done.wide_reads == 2 * done.wide_writes
