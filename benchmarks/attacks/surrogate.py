"""The small network that some attackers train on clean images to craft their triggers against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnp_fast.demo.train import train

from .attack import CLASSES

WIDTH, EPOCHS = 16, 10


def surrogate(images: Tensor, labels: Tensor, seed: int, noise: float = 0.0) -> nn.Module:
    """Three convolutions and a linear layer, trained; in eval mode, without gradients.

    `noise` is the standard deviation of what is added to training images.
    """

    def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + noise * torch.randn(images.shape, generator=generator)

    layers: list[nn.Module] = []
    channels = [images.shape[1], WIDTH, 2 * WIDTH, 4 * WIDTH]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in range(3):
            layers += [
                nn.Conv2d(channels[index], channels[index + 1], 3, 1 + (index > 0), 1, bias=False),
                nn.BatchNorm2d(channels[index + 1]),
                nn.ReLU(),
            ]
        pool = nn.AdaptiveAvgPool2d(1)
        model = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels[-1], CLASSES))
    for _ in train(model, images, labels, epochs=EPOCHS, seed=seed, augment=noisy):
        pass
    return model.requires_grad_(False)
