"""When CMake builds the CUDA library, and what it says if not; nvcc is a stand-in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .shim import ROOT


def configure(nvcc, **definitions):
    folders = [
        str(Path(sys.executable).parent),
        *(str(Path(p) / "cmake/data/bin") for p in sys.path),
    ]
    cmake = shutil.which("cmake", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    given = {"torch_version": "2.13.0", "torch_cuda": "", **definitions}
    options = [f"-D{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [cmake, *options, "-P", ROOT / "cmake" / "cuda.cmake"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDACXX": str(nvcc)},
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def nvcc(tmp_path):
    def make(release):
        script = tmp_path / "nvcc"
        script.write_text(
            f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}"\n'
        )
        script.chmod(0o755)
        return script

    return make


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "release", "reason"),
    [
        ("OFF", "13.0", "13.0", "mnp_fast was built with MNP_FAST_CUDA=OFF"),
        ("AUTO", "", "13.0", "mnp_fast was built against torch 2.13.0, which has no CUDA"),
        ("AUTO", "12.8", "13.0", "built with nvcc 13.0, but torch 2.13.0 is for CUDA 12.8"),
        ("AUTO", "12.8", "12.0", "needs CUDA 12.1 or later, and was built with nvcc 12.0"),
    ],
)
def test_left_out_with_a_reason(nvcc, mode, torch_cuda, release, reason):
    status, text = configure(nvcc(release), MNP_FAST_CUDA=mode, torch_cuda=torch_cuda)
    assert status == 0
    assert "No CUDA kernels: " in text
    assert reason in text


@pytest.mark.parametrize(("torch_cuda", "release"), [("12.8", "13.0"), ("", "11.8")])
def test_on_fails_where_it_cannot(nvcc, torch_cuda, release):
    status, text = configure(nvcc(release), MNP_FAST_CUDA="ON", torch_cuda=torch_cuda)
    assert status == 1
    assert "MNP_FAST_CUDA=ON, but the CUDA kernels cannot be built: " in text


def test_unknown_mode_is_refused(nvcc):
    status, text = configure(nvcc("13.0"), MNP_FAST_CUDA="maybe")
    assert status == 1
    assert "MNP_FAST_CUDA must be AUTO, ON or OFF, not 'maybe'" in text
