"""Runs interpreted.py, where the kernels are executed on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

PARTS = 2  # side by side, as each of them runs on one core


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    running = []
    for part in range(PARTS):
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "MNP_TEST_PART": f"{part}/{PARTS}",
        }
        running.append(
            subprocess.Popen(
                [*command, "-p", "tests.triton.part", str(file)],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
        assert re.search(r"^\d+ passed(, \d+ warnings?)? in", output, re.MULTILINE), output
