"""The tests of the kernels notice a wrong index, a missing barrier, a wrong bound."""

import shutil
import subprocess
from functools import cache

import pytest
import torch

from . import cases, shim

# File, what is replaced, by what.
MUTATIONS = [
    ("epilogue", "const Span all{0, size};", "const Span all{0, size + 1};"),
    ("epilogue", "if (left == 0 && row", "if (left == 1 && row"),
    ("epilogue", "divide(i + j, by_sample)", "divide(i, by_sample)"),
    ("epilogue", "/ period * period;", ";"),
    ("epilogue", "i + (kAhead - 1) * step + V <= size", "i + (kAhead - 1) * step < size"),
    ("epilogue_grad", "total[j][s];\n    __syncthreads();", "total[j][s];"),
    ("epilogue_grad", "row >= half && row < 2 * half", "row > half && row < 2 * half"),
    ("epilogue_grad", "= total[s];\n    __syncthreads();", "= total[s];"),
    ("epilogue_grad", "row + half < t.rows", "row + half <= t.rows"),
    ("epilogue_grad", "span.begin / V * V + lane * V", "span.begin + lane * V"),
    ("epilogue_grad", "const bool inside = k < neurons;", "const bool inside = true;"),
    ("epilogue_grad", "if (widen(y.at[j]) <= 0)", "if (widen(y.at[j]) < 0)"),
    ("epilogue_grad", "{row * inner, (row + 1) * inner}", "{row * inner, (row + 1) * inner + 1}"),
    ("epilogue_grad", "p < end; p += t.rows", "p <= end; p += t.rows"),
    ("magnitude", "span{ahead, ahead + rows.size};", "span{ahead, rows.size};"),
    ("magnitude", "a.first[layer + step] <= row", "a.first[layer + step] < row"),
    ("magnitude", "if (number >= a.first[a.count]) return;", ""),
    ("magnitude", "step < kWarp; step *= 2", "step < kWarp / 2; step *= 2"),
    ("mask_update", "a.first[layer + 1] <= blockIdx.x", "a.first[layer + 1] < blockIdx.x"),
    ("mask_update", "const Span all{0, s.size};", "const Span all{0, s.size + 1};"),
]  # fmt: skip


@cache
def cases_of(name):
    single = torch.float32
    if name.startswith("epilogue"):
        make = cases.epilogues if name == "epilogue" else cases.epilogue_grads
        return [case for last in (False, True) for case in make(single, last)]
    return list((cases.magnitudes if name == "magnitude" else cases.mask_updates)(single))


def replace(path, text, other):
    source = path.read_text()
    assert source.count(text) == 1
    path.write_text(source.replace(text, other))


@pytest.fixture
def csrc(tmp_path):
    """The sources for one type of elements, which is enough here and compiles faster."""
    folder = tmp_path / "csrc"
    shutil.copytree(shim.CSRC, folder, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    for other in ("double{}", "__half{}", "__nv_bfloat16{}"):
        replace(folder / "cuda" / "device.cuh", f"return f({other});", "return f(float{});")
    return folder


@pytest.mark.parametrize("name", shim.KERNELS)
def test_without_a_mutation_all_is_right(name, csrc, objects):
    cases.check(shim.build(objects, csrc), cases_of(name))


@pytest.mark.parametrize(("name", "text", "wrong"), MUTATIONS)
def test_is_noticed(name, text, wrong, csrc, objects):
    replace(csrc / "cuda" / f"{name}.cu", text, wrong)
    mutant = shim.build(objects, csrc)
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        cases.check(mutant, cases_of(name))
