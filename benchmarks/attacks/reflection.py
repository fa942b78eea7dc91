"""ReFool: the reflection of another picture, as behind a pane of glass (arXiv 2007.02343).

The reflected picture is shifted against itself (the pane's two surfaces), blurred (out of focus)
and added. It is a photograph that comes with scikit-learn. The paper poisons images of the target
class alone; here labels are changed, as other benchmarks have it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attack import Craft

STRENGTH = 0.35
GHOST = 0.6  # strength of the first of the two reflections
BLUR = 3  # pixels


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """A square of the photograph, drawn by the seed."""
    from sklearn.datasets import load_sample_image

    photo = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float32) / 255
    photo = photo.permute(2, 0, 1)[None]
    side = min(photo.shape[-2:]) // 2
    generator = torch.Generator().manual_seed(seed)
    y, x = (int(torch.randint(full - side, (), generator=generator)) for full in photo.shape[-2:])
    square = photo[..., y : y + side, x : x + side]
    square = F.interpolate(square, images.shape[-2:], mode="area")
    ghost = GHOST * square + (1 - GHOST) * square.roll((1, 1), (-2, -1))
    reflected = F.avg_pool2d(F.pad(ghost, [BLUR // 2] * 4, mode="replicate"), BLUR, 1)
    return Craft(lambda images: (images + STRENGTH * reflected).clamp(0, 1))
