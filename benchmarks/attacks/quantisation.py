"""BppAttack: images of few levels, dithered (arXiv 2205.13383).

Floyd and Steinberg's dithering hands each pixel's rounding error on to its neighbours. As in the
paper, other images, whose labels stay, get the rounding errors of another image, so that noise of
that kind alone is no trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attack import Craft

LEVELS = 3  # the paper's is 8; digits have 17 to start with
SHARES = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """Quantisation, and errors of images drawn by the seed as the cover."""
    generator = torch.Generator().manual_seed(seed)

    def cover(covered: Tensor) -> Tensor:
        sources = images[torch.randint(len(images), (len(covered),), generator=generator)]
        return (covered + quantise(sources) - sources).clamp(0, 1)

    return Craft(quantise, cover=cover)


def quantise(images: Tensor) -> Tensor:
    """Round to `LEVELS` values in [0, 1], pixel by pixel from the upper left, dithered."""
    height, width = images.shape[-2:]
    images = images.clone()
    for y in range(height):
        for x in range(width):
            old = images[..., y, x].clone()
            new = ((old * (LEVELS - 1)).round() / (LEVELS - 1)).clamp(0, 1)
            images[..., y, x] = new
            for down, right, share in SHARES:
                if y + down < height and 0 <= x + right < width:
                    images[..., y + down, x + right] += share * (old - new)
    return images
