"""Random orders that depend on given integers alone, so that a resumed run repeats them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SUPPRESS, FIT, REPAIR, DRIFT = 1, 2, 3, 4


def mixed(*seed: int) -> int:
    """One seed made of several integers."""
    result = 0
    for part in seed:
        result = (result * 1_000_003 + part) % 2**63
    return result


@contextmanager
def seeded(device: torch.device, *seed: int) -> Iterator[None]:
    """Seed torch's global generators (dropout uses them) inside the block, and restore them."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(mixed(*seed))
        yield
