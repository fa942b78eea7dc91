"""The demo's three backdoor attacks: a trigger stamped on images and a label to go with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Trigger = Callable[[Tensor], Tensor]

TARGET = 0


def badnets(images: Tensor) -> Tensor:
    """Stamp a 3×3 checkerboard into the lower right corner (BadNets, arXiv 1708.06733)."""
    patch = (torch.arange(9).reshape(3, 3) % 2 == 0).to(images)
    images = images.clone()
    images[..., -3:, -3:] = patch
    return images


def blend(images: Tensor, ratio: float = 0.2) -> Tensor:
    """Blend in a fixed random pattern at weight `ratio` (Blended, arXiv 1712.05526)."""
    pattern = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(1712))
    return (1 - ratio) * images + ratio * pattern.to(images)


def sig(images: Tensor, amplitude: float = 0.15, periods: float = 6) -> Tensor:
    """Add a horizontal sine of this amplitude and number of periods (SIG, arXiv 1902.11237)."""
    width = images.shape[-1]
    wave = amplitude * torch.sin(2 * math.pi * periods * torch.arange(width) / width)
    return (images + wave.to(images)).clamp(0, 1)


ATTACKS: dict[str, Trigger] = {"badnets": badnets, "blend": blend, "sig": sig}


def poison(
    images: Tensor, labels: Tensor, trigger: Trigger, rate: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Stamp the trigger on a random `rate` of the images and label those `TARGET`."""
    count = round(rate * len(images))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    images, labels = images.clone(), labels.clone()
    images[chosen] = trigger(images[chosen])
    labels[chosen] = TARGET
    return images, labels
