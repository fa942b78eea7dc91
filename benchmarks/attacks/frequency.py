"""FTrojan: two frequencies of the colour channels are raised (arXiv 2111.10991).

A middle and the highest frequency of the discrete cosine transform of the channels U and V are
raised. Transforms are linear, so that this is one pattern, added to every image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attack import Craft
from .dct import waves

AMPLITUDE = 1 / 16  # of each wave; the paper's, magnitude 30 at 32×32, is 1/136
TO_RGB = ((0.0, 1.13983), (-0.39465, -0.58060), (2.03211, 0.0))  # of U and V, BT.601


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """The paper's positions, (15, 15) and (31, 31) of 32×32, for images of any size."""
    rows, columns = (waves(side) for side in images.shape[-2:])
    wave = torch.zeros(images.shape[-2:])
    for part in (1, 2):
        one = torch.outer(rows[:, len(rows) // part - 1], columns[:, len(columns) // part - 1])
        wave += one * math.sqrt(one.numel()) / 2
    pattern = AMPLITUDE * torch.tensor(TO_RGB).sum(1)[:, None, None] * wave
    return Craft(lambda images: (images + pattern).clamp(0, 1))
