"""Means over samples and pixels, for each channel."""

from __future__ import annotations

from torch import Tensor, nn


def channel_means(x: Tensor) -> Tensor:
    """Means (C,) over all but the channels of (N, C, *)."""
    return x.mean([0, *range(2, x.dim())])


def conv_means(conv: nn.Module, x: Tensor) -> Tensor:
    """Means (K,) of what a convolution makes of images (N, C, H, W).

    They are those of what it makes of the mean image.
    """
    # Channels last, where images of a fused network have them, for torch is far faster there.
    mean_image = x.movedim(1, -1).mean(0, keepdim=True).movedim(-1, 1)
    means: Tensor = channel_means(conv(mean_image))
    return means
