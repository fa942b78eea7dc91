"""Runs interpreted.py, where the kernels are executed on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
