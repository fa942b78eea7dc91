"""Every kernel and configuration compiled for every target: registers, memory, accesses."""

import pytest
import triton

from .resources import CASES, TARGETS, compile_all, stored

UPDATE = "python -m tests.triton.resources --update"


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def test_nothing_is_spilled(compiled):
    assert not [c.name for c in compiled if c.stack]


def test_every_target_and_case_is_there(compiled):
    assert {(c.target, c.case) for c in compiled} == {(t, c) for t in TARGETS for c in CASES}


def test_registers_and_shared_memory_are_those_of_the_baseline(compiled):
    tables = stored()
    known = triton.__version__ in tables
    latest = max(tables, key=lambda version: [int(part) for part in version.split(".")])
    baseline = tables[triton.__version__ if known else latest]
    slack = 1.0 if known else 1.5  # another release has another ptxas
    found = {c.name: [c.registers, c.shared] for c in compiled}
    assert found.keys() == baseline.keys(), UPDATE
    for name, (registers, shared) in baseline.items():
        assert found[name][0] <= registers * slack, f"{name}: registers. {UPDATE}"
        assert found[name][1] <= shared * slack, f"{name}: shared memory. {UPDATE}"


def test_accesses_have_16_bytes_where_they_are_aligned(compiled):
    # Sums are 4 bytes a neuron and chunk. Half types are added to sums of 4 bytes, so the tile of
    # the residual is read in the layout of those: 4 elements, 8 bytes.
    narrower = {"epilogue_backward": {"st.global 4"}, "conv_forward": {"ld.global 8"}}
    for c in compiled:
        if "unaligned" in c.case:
            continue
        accesses = {i for i in c.instructions if i.startswith(("ld", "st", "cp"))}
        allowed = (
            set()
            if c.kernel == "conv_forward" and "32" in c.case
            else narrower.get(c.kernel, set())
        )
        wide = {i for i in accesses if i.endswith(" 16")}
        assert wide, c.name
        assert accesses - wide <= allowed, c.name


def test_products_are_on_the_tensor_cores_that_the_target_has(compiled):
    expected = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma"}}
    for c in compiled:
        if c.kernel == "epilogue_backward":
            continue
        products = {i for i in c.instructions if "mma" in i}
        # In float32, torch's default for matrix products, nothing is rounded to TF32.
        assert products == (set() if "float32" in c.case else expected[c.target]), c.name
