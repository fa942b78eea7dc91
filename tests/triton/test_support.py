import pytest
import torch

from mnp_fast.triton import why_not_conv2d, why_not_linear
from mnp_fast.triton.conv import masked_conv2d
from mnp_fast.triton.linear import masked_linear

ONES = torch.ones(2, 2, 3, 3)


class OnGpu:
    """What the predicates look at, of a tensor on a GPU that is not there."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.fixture
def capability(monkeypatch):
    """Sets the compute capability that torch reports."""

    def set_to(*version):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)

    set_to(9, 0)
    return set_to


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_none_where_they_can(capability, dtype):
    assert why_not_conv2d(OnGpu(dtype), OnGpu(dtype)) is None
    assert why_not_linear(OnGpu(dtype), OnGpu(dtype)) is None


def test_reasons(capability):
    single, double = OnGpu(torch.float32), OnGpu(torch.float64)
    assert why_not_conv2d(single, single, groups=2) == "groups must be 1, not 2"
    allowed = "dtype must be one of float32, float16, bfloat16, not float64"
    assert why_not_conv2d(double, double) == allowed
    assert "share a dtype" in why_not_linear(single, double)
    assert "one device, not on cuda:0 and cpu" in why_not_linear(single, ONES)
    assert why_not_linear(ONES, ONES) == "x must be on a CUDA device, not on cpu"
    capability(7, 5)
    assert "8.0 or later" in why_not_conv2d(single, single)


def test_tensors_on_the_cpu_are_refused():
    for call in (lambda: masked_conv2d(ONES, ONES), lambda: masked_linear(ONES, ONES[0, 0])):
        with pytest.raises(RuntimeError, match="x must be on a CUDA device, not on cpu"):
            call()
