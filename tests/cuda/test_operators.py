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
SUITES = {"affine": (), "magnitude": ("-k", "not spectral"), "update": (), "conv": ("-k", CONV)}


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
    compiled = [shim.compile_unit(source, shim.CSRC, objects, flags) for source in sources]
    key = hashlib.sha256(" ".join(map(str, compiled)).encode()).hexdigest()[:20]
    target = objects / f"operators-{key}.so"
    if not target.exists():
        # Its own stand-ins come before what torch has by the same names.
        link = ["-shared", "-Wl,-Bsymbolic", *compiled, f"-L{torch_dir}/lib", "-ltorch_cpu"]
        shim.run([shim.COMPILER, *link, f"-Wl,-rpath,{torch_dir}/lib", "-o", target])
    return target


@pytest.mark.parametrize("name", SUITES)
def test_operators_pass_the_tests_of_the_cpu(name, library):
    file = shim.ROOT / "tests" / "ops" / f"test_{name}.py"
    options = ("-p", "tests.cuda.on_cpu", "-p", "no:cacheprovider", "-q", *SUITES[name])
    done = shim.run(
        [sys.executable, "-m", "pytest", file, *options],
        cwd=shim.ROOT,
        env={**os.environ, "MNP_TEST_LIBRARY": str(library)},
    )
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
