"""The tests of the kernels notice a wrong index, a missing barrier, a wrong bound."""

import random
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
    ("epilogue_grad", "parts + s * size + i", "parts + s * size"),
    ("epilogue_grad", "size % kLanes<C> == 0 && aligned", "aligned"),
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


def sources(folder):
    """The sources for one type of elements, which is enough here and compiles faster."""
    shutil.copytree(shim.CSRC, folder, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    for other in ("double{}", "__half{}", "__nv_bfloat16{}"):
        replace(folder / "cuda" / "device.cuh", f"return f({other});", "return f(float{});")
    return folder


@pytest.mark.parametrize("name", shim.KERNELS)
def test_without_a_mutation_all_is_right(name, tmp_path, objects):
    cases.check(shim.build(objects, sources(tmp_path / "csrc")), cases_of(name))


def is_noticed(mutation, folder, objects):
    name, text, wrong = mutation
    csrc = sources(folder)
    replace(csrc / "cuda" / f"{name}.cu", text, wrong)
    mutant = shim.build(objects, csrc)
    try:
        cases.check(mutant, cases_of(name))
    except (AssertionError, subprocess.TimeoutExpired):
        return True
    return False


@pytest.fixture(scope="module")
def noticed(objects, tmp_path_factory, pool):
    """Of every mutation, whether it is noticed, in time."""
    folder = tmp_path_factory.mktemp("mutants")
    random.seed(0)
    # What threads would share is made before: random numbers, and objects without a mutation.
    for name in shim.KERNELS:
        cases_of(name)
    shim.build(objects, sources(folder / "none"))
    return [
        pool.submit(is_noticed, mutation, folder / str(index), objects)
        for index, mutation in enumerate(MUTATIONS)
    ]


@pytest.mark.parametrize("index", range(len(MUTATIONS)), ids=lambda index: MUTATIONS[index][1])
def test_is_noticed(index, noticed):
    assert noticed[index].result()
