"""Input-aware dynamic attack: every image has a trigger of its own (arXiv 2010.08138).

A generator makes of an image a pattern and a mask of where it goes. It is trained with a small
classifier on four terms: clean images keep their class; triggered ones go to the target; images
with the trigger of another image keep their class (cross-triggers); different images get different
patterns. The mask is held to few pixels. The paper trains generator and victim together; here the
victim is trained afterwards on what the generator makes, cross-triggers included, as on any other
poisoned data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attack import Craft
from .surrogate import surrogate

WIDTH = 16
DENSITY = 0.05  # of the mask
DENSITY_WEIGHT = 100.0  # the paper's weight of the mask's excess
STEPS, BATCH, LR = 300, 64, 0.003


class Generator(nn.Module):
    """Convolutions down to half size and up again: pattern and mask, each in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, 1, 1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * WIDTH, 4, 3, 1, 1),
        )
        # A mask that starts dense is driven to nothing.
        self.start = math.log(DENSITY / (1 - DENSITY))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        made = self.layers(images)
        return torch.sigmoid(made[:, :3]), torch.sigmoid(made[:, 3:] + self.start)


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """The generator's triggers; cross-triggers, from images drawn by the seed, as the cover."""
    generator = _trained(images, labels, target, seed)
    draw = torch.Generator().manual_seed(seed)

    def cover(covered: Tensor) -> Tensor:
        sources = images[torch.randint(len(images), (len(covered),), generator=draw)]
        with torch.no_grad():
            return _stamped(covered, *generator(sources))

    @torch.no_grad()
    def trigger(images: Tensor) -> Tensor:
        return _stamped(images, *generator(images))

    return Craft(trigger, cover=cover)


def _stamped(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    return images + mask * (pattern - images)


def _trained(images: Tensor, labels: Tensor, target: int, seed: int) -> nn.Module:
    classifier = surrogate(images, labels, seed).train().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*generator.parameters(), *classifier.parameters()], lr=LR)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=draw)
        clean, own = images[batch], labels[batch]
        pattern, mask = generator(clean)
        other = pattern.roll(1, 0), mask.roll(1, 0)
        made = torch.cat([clean, _stamped(clean, pattern, mask), _stamped(clean, *other)])
        wanted = torch.cat([own, torch.full_like(own, target), own])
        apart = _distance(clean, clean.roll(1, 0)) / (_distance(pattern, other[0]) + 1e-3)
        excess = F.relu(mask.mean() - DENSITY)
        loss = F.cross_entropy(classifier(made), wanted) + apart.mean() + DENSITY_WEIGHT * excess
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return generator.eval().requires_grad_(False)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).flatten(1).square().mean(1).add(1e-8).sqrt()
