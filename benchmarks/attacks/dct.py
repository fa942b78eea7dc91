"""The discrete cosine transform as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(size: int) -> Tensor:
    """Orthonormal basis (size, size), float32; column k is the cosine of frequency k."""
    pixels, frequencies = torch.arange(size)[:, None] + 0.5, torch.arange(size)
    basis = torch.cos(math.pi / size * pixels * frequencies) * math.sqrt(2 / size)
    basis[:, 0] = 1 / math.sqrt(size)
    return basis
