"""A small network with a backdoor, trained in a second, and the clean set to defend it with."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from mnp_fast.data import CleanSet
from mnp_fast.demo.attacks import TARGET, badnets, poison
from mnp_fast.demo.train import train

CLASSES = 4


def small_net(width: int = 8) -> nn.Sequential:
    """Two convolutions with batch norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def stripes(count: int, seed: int) -> CleanSet:
    """Noisy 8×8 images in [0, 1] of stripes, whose direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.5 * axis) for axis in (x, y, x + y, x - y)])
    images = 0.5 + 0.25 * waves[labels][:, None].expand(-1, 3, -1, -1)
    noise = torch.randn(images.shape, generator=generator)
    return CleanSet((images + 0.1 * noise).clamp(0, 1), labels)


@cache
def _trained() -> nn.Sequential:
    data = stripes(400, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_net()
    images, labels = poison(data.images, data.labels, badnets, 0.1, seed=0)
    for _ in train(model, images, labels, epochs=12):
        pass
    return model


def backdoored() -> nn.Sequential:
    """A fresh copy of a network that `badnets` sends to class `TARGET`."""
    return copy.deepcopy(_trained())


def attack_success(model: nn.Module) -> float:
    """Percent of images of other classes that the trigger sends to the target."""
    data = stripes(200, seed=3)
    others: Tensor = badnets(data.images[data.labels != TARGET])
    with torch.no_grad():
        return 100 * (model(others).argmax(1) == TARGET).double().mean().item()
