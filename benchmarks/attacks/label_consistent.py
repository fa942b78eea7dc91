"""Clean-label attack: only images of the target class are poisoned (arXiv 1912.02771).

Their own features are made hard to learn from by an adversarial perturbation, found by projected
gradient ascent on a network that the attacker trained on clean images; then a trigger in all four
corners is the easier feature. Test images get the corners alone. The paper recommends adversarially
trained networks, whose perturbations carry over to others; here noise on the training images does
that. The perturbation is the same in all channels: colour on grey digits would be a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast.demo.attacks import badnets

from .attack import Craft
from .surrogate import surrogate

RADIUS = 0.2  # largest change of a pixel
STEPS = 20
NOISE = 0.3  # standard deviation


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """The corners, and under them the perturbation where a training image is poisoned."""
    model = surrogate(images, labels, seed, noise=NOISE)

    def disguise(images: Tensor) -> Tensor:
        own = torch.full((len(images),), target)
        hard = images.clone()
        for _ in range(STEPS):
            hard.requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(model(hard), own), [hard])
            slope = slope.mean(1, keepdim=True).sign()
            hard = hard.detach() + 2.5 * RADIUS / STEPS * slope
            hard = images + (hard - images).clamp(-RADIUS, RADIUS)
            hard = hard.clamp(0, 1)
        return corners(hard)

    return Craft(corners, disguise=disguise)


def corners(images: Tensor) -> Tensor:
    """BadNets' patch in every corner."""
    for axes in ((-1,), (-2,), (-1,), (-2,)):
        images = badnets(images).flip(axes)
    return images
