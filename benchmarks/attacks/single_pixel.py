"""One bright pixel: BadNets' single-pixel backdoor (arXiv 1708.06733)."""

from __future__ import annotations

from torch import Tensor

from .attack import Craft


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """White at two pixels from the lower right corner, where digits have nothing."""

    def trigger(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., -2, -2] = 1
        return images

    return Craft(trigger)
