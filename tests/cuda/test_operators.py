"""The operators around the CUDA kernels, compiled for the CPU, under the tests of tests/ops."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch

from . import shim

# Of the convolution, what is not about the CPU's algorithms, precision and messages, nor slow here.
CONV = "channels_last or any_stride or opcheck or nan or compiles or linear_matches"
# Of fused models, what runs regions of several blocks: here one block after the other.
FUSION = "apart or odd_structures or whole_network or one_kind_alone"
SUITES = {
    "ops/test_affine.py": "",
    "ops/test_magnitude.py": "(not spectral or linalg) and not every_value",
    "ops/test_update.py": "",
    "ops/test_conv.py": CONV,
    "test_fusion.py": FUSION,
}


@pytest.fixture(scope="module")
def library(objects):
    torch_dir = Path(torch.__file__).parent
    flags = ("-O0", "-fPIC", "-fvisibility=hidden", "-isystem", f"{torch_dir}/include")
    flags += ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
    operators = [p for p in shim.CSRC.glob("ops/cuda/*.cpp") if p.name != "library.cpp"]
    sources = [
        *(shim.CSRC / "cuda" / f"{name}.cu" for name in shim.KERNELS),
        *sorted(operators),
        shim.CSRC / "ops" / "tensors.cpp",
        shim.SHIM / "library.cpp",
        shim.SHIM / "fibers.cpp",
    ]
    compiled = shim.compile_units(sources, shim.CSRC, objects, flags)
    key = hashlib.sha256(" ".join(map(str, compiled)).encode()).hexdigest()[:20]
    target = objects / f"operators-{key}.so"
    if not target.exists():
        # Its own stand-ins come before what torch has by the same names.
        link = ["-shared", "-Wl,-Bsymbolic", *compiled, f"-L{torch_dir}/lib", "-ltorch_cpu"]
        shim.run([shim.COMPILER, *link, f"-Wl,-rpath,{torch_dir}/lib", "-o", target])
    return target


@pytest.fixture(scope="module")
def finished(library, pool):
    """Of every suite, the process that ran it, in time."""
    environment = {**os.environ, "MNP_TEST_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "tests.cuda.on_cpu", "-p", "no:cacheprovider"]
    return {
        file: pool.submit(
            shim.run,
            [*command, "-q", shim.ROOT / "tests" / file, "-k", chosen],
            cwd=shim.ROOT,
            env=environment,
        )
        for file, chosen in SUITES.items()
    }


@pytest.mark.parametrize("file", SUITES)
def test_operators_pass_the_tests_of_the_cpu(file, finished):
    done = finished[file].result()
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
