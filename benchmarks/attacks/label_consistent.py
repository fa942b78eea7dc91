"""Clean-label attack: only images of the target class are poisoned (arXiv 1912.02771).

Their own features are made hard to learn from by an adversarial perturbation, found by projected
gradient ascent on a network that the attacker trained on clean images; then a trigger in all four
corners is the easier feature. Test images get the corners alone. The paper recommends adversarially
trained networks, whose perturbations carry over to others; here noise on the training images does
that. So that the perturbation itself is no feature, it is the same in all channels, and other
images, which keep their labels too, are perturbed without corners.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mnp_fast.demo.attacks import badnets

from .attack import Craft
from .surrogate import surrogate

RADIUS = 0.3  # largest change of a pixel
STEPS = 20
NOISE = 0.3  # standard deviation


def craft(images: Tensor, labels: Tensor, seed: int) -> Craft:
    """The corners, over the perturbation where a training image is poisoned; it alone as cover."""
    model = surrogate(images, labels, seed, noise=NOISE)

    def hard(images: Tensor) -> Tensor:
        own, found = model(images).argmax(1), images.clone()
        for _ in range(STEPS):
            found.requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(model(found), own), [found])
            step = 2.5 * RADIUS / STEPS * slope.mean(1, keepdim=True).sign()
            change = (found.detach() + step - images).clamp(-RADIUS, RADIUS)
            found = (images + change).clamp(0, 1)
        return found

    return Craft(corners, disguise=lambda images: corners(hard(images)), cover=hard)


def corners(images: Tensor) -> Tensor:
    """BadNets' patch in every corner."""
    for axes in ((-1,), (-2,), (-1,), (-2,)):
        images = badnets(images).flip(axes)
    return images
