"""The text of the CUDA kernels, run on the CPU between guards, with poisoned outputs."""

import pytest
import torch

from . import cases, shim
from .shim import ELEMENTS, Buffer, Call, execute


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_epilogue(program, dtype, channels_last):
    cases.check(program, list(cases.epilogues(dtype, channels_last)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_epilogue_grad(program, dtype, channels_last):
    cases.check(program, list(cases.epilogue_grads(dtype, channels_last)))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_magnitude(program, dtype):
    cases.check(program, list(cases.magnitudes(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_update(program, dtype):
    cases.check(program, list(cases.mask_updates(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_half_type(program, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    u = Buffer(bits.view(dtype))
    absent, y = [Buffer(None)] * 5, Buffer(u.tensor, "out")
    call = Call("epilogue", [1, 1, 2**16, 0, ELEMENTS[dtype], 0, 0, 0], [u, *absent, y])
    (result,) = execute(program, [call], reverse=False)[0].written
    torch.testing.assert_close(result, u.tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_take_several_turns(program, channels_last):
    """More elements than a launch has threads for."""
    u = torch.randn(1, 7, 160_001)
    y = Buffer(cases.laid_out(u, channels_last), "out", offset=4)
    absent = [Buffer(None)] * 5
    given = Buffer(y.tensor, offset=4)
    call = Call("epilogue", [1, 7, 160_001, channels_last, 0, 0, 0, 1], [given, *absent, y])
    (result,) = execute(program, [call], reverse=False)[0].written
    assert torch.equal(result, y.tensor.relu())


def test_what_cannot_be_launched_is_an_error(program):
    absent = [Buffer(None)] * 9
    single = ELEMENTS[torch.float32]
    for call, why in (
        (Call("epilogue_grad", [2**32, 2, 1, 0, single, 0, 0, 0], absent), "too many neurons"),
        (Call("magnitude", [single, 0, 2**35, 1, 1], absent[:2]), "too many elements"),
    ):
        with pytest.raises(AssertionError, match=f"the tensor has {why}"):
            execute(program, [call], reverse=False)


def test_division_of_64_bits(objects):
    shim.run([shim.link([shim.SHIM / "fibers.cpp", shim.SHIM / "divide.cpp"], objects)])
