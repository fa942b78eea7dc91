"""WaNet: images are warped slightly (arXiv 2102.10369).

A grid of 4×4 random shifts, of mean size 1, is enlarged to the image by bicubic interpolation, and
multiplied by `STRENGTH` / height, in units of half the image. Noise mode: other images, whose
labels stay, are warped with a random shift of each pixel added, so that only the one warp counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attack import Craft

POINTS = 4
STRENGTH = 4.0  # the paper's is 0.5, for photographs; digits hardly change under a quarter pixel


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """One warp, drawn by the seed."""
    size = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.rand(1, 2, POINTS, POINTS, generator=generator) - 1
    shifts = F.interpolate(coarse / coarse.abs().mean(), size, mode="bicubic", align_corners=True)
    axes = [torch.linspace(-1, 1, side) for side in size]
    y, x = torch.meshgrid(*axes, indexing="ij")
    warp = torch.stack([x, y], -1)[None] + STRENGTH / size[0] * shifts.permute(0, 2, 3, 1)

    def trigger(images: Tensor) -> Tensor:
        return _sample(images, warp.expand(len(images), -1, -1, -1))

    def cover(images: Tensor) -> Tensor:
        noise = torch.rand(len(images), *warp.shape[1:], generator=generator)
        return _sample(images, warp + (2 * noise - 1) / size[0])

    return Craft(trigger, cover=cover)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images, grid.clamp(-1, 1), align_corners=True).clamp(0, 1)
