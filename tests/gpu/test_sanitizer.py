"""compute-sanitizer finds nothing in the kernels: accesses, races, barriers, unset memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
)
# Torch asks the driver for what it may not have, and handles the answer.
OPTIONS = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "synccheck": (),
    "initcheck": (),
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed"),
]


@pytest.mark.parametrize("tool", OPTIONS)
def test_nothing_is_found(tool):
    program = [sys.executable, "-m", "tests.gpu.sanitized"]
    done = subprocess.run(
        [TOOL, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "9", *program],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
