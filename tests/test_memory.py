import pytest
import torch

import mnp_fast


@pytest.fixture
def budget():
    before = mnp_fast.memory_budget()
    yield before
    mnp_fast.set_memory_budget(before)


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def convolve(x, weight):
    return mnp_fast.ops.masked_conv2d(x, weight, padding=1, activation="relu")


def test_results_do_not_depend_on_the_budget(budget):
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    kept = [convolve(x, weight) for _ in range(2)]
    mnp_fast.set_memory_budget(0)
    assert mnp_fast.memory_budget() == 0
    for y in (*kept[1:], convolve(x, weight), convolve(x, weight)):
        assert torch.equal(y, kept[0])


def test_what_is_kept_is_freed(budget):
    x, weight = torch.randn(1, 1024, 64, 64), torch.randn(256, 1024, 3, 3)
    # Transforms the image into 36 MiB.
    mnp_fast.ops.masked_conv2d(x, weight, padding=1, algorithm="winograd4")
    before = resident()
    mnp_fast.set_memory_budget(0)
    assert resident() < before - (30 << 20)


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="at least 0 bytes, not -1"):
        mnp_fast.set_memory_budget(-1)
