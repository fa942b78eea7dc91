"""Installs without Triton work, and say what is missing."""

import subprocess
import sys

BLOCK = "import sys; sys.modules['triton'] = None\n"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_does_not_import_triton():
    code = "import sys, mnp_fast, mnp_fast.triton; print('triton' in sys.modules)"
    assert run(code) == "False"


def test_import_without_triton():
    code = """
import torch, mnp_fast.triton as t
ones = torch.ones(1, 1, 1, 1)
print(mnp_fast.ops.masked_conv2d(ones, ones).item(), t.why_not_linear(ones, ones))
"""
    reason = "the package triton is not installed (pip install 'mnp_fast[triton]')"
    assert run(BLOCK + "import mnp_fast" + code) == f"1.0 {reason}"
