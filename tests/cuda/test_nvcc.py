"""The kernels compile for real devices, without spills and within what they were known to need."""

import json
import re

import pytest

from . import nvcc
from .shim import KERNELS

pytestmark = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_resources_stay_within_the_baseline(name, target, objects):
    stored = json.loads(nvcc.BASELINE.read_text())
    used = nvcc.resources(nvcc.compile_kernels(name, target, objects)[0])
    assert used
    more = {
        kernel: (now, stored[target].get(kernel))
        for kernel, now in used.items()
        if kernel not in stored[target]
        or any(a > b for a, b in zip(now, stored[target][kernel], strict=True))
    }
    assert not more, (
        f"(registers, bytes of shared memory) now and in the baseline of nvcc {stored['nvcc']}: "
        f"{more}. python -m tests.cuda.nvcc stores those of nvcc {nvcc.release()}"
    )


# Tensors that each kernel streams, and those that it writes.
STREAMS = {
    "epilogue_planes": (2, 1),
    "epilogue_channels_last": (2, 1),
    "grad_planes": (3, 2),
    "grad_channels_last": (3, 2),
    "norms": (1, 0),
    "step": (4, 2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_streams_are_accessed_by_16_bytes(name, objects):
    """Every tensor that a vectorised kernel streams has such accesses in its code."""
    _, ptx = nvcc.compile_kernels(name, "sm_90", objects)
    seen = 0
    for kernel, body in nvcc.entries(ptx).items():
        template = kernel.split("<")[0]
        if template not in STREAMS or (template != "norms" and kernel.endswith(", 1>")):
            continue  # the others are for tensors that do not start at a border of 16 bytes
        seen += 1
        reads, writes = STREAMS[template]
        wide = r"\.global(\.\w+)?\.(v4\.\w(32)|v2\.\w(64))"
        assert len(re.findall(rf"\bld{wide}", body)) >= reads, kernel
        assert len(re.findall(rf"\bst{wide}", body)) >= writes, kernel
    assert seen >= 2
