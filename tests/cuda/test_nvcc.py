"""The kernels compile for real devices, without spills and within what they were known to need."""

import json
import re

import pytest

from . import nvcc
from .shim import KERNELS

pytestmark = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def compiled(objects, pool):
    """Of every file and target, what ptxas says and the PTX, in time."""
    return {
        (name, target): pool.submit(nvcc.compile_kernels, name, target, objects)
        for target in nvcc.TARGETS
        for name in KERNELS
    }


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_resources_stay_within_the_baseline(name, target, compiled):
    stored = json.loads(nvcc.BASELINE.read_text())
    used = nvcc.resources(compiled[name, target].result()[0])
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
    "add_parts": (1, 1),
    "norms": (1, 0),
    "step": (4, 2),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_streams_are_accessed_by_16_bytes(name, target, compiled):
    """Every tensor that a vectorised kernel streams has such accesses in its code."""
    _, ptx = compiled[name, target].result()
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
