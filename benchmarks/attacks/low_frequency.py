"""LF: a smooth universal perturbation (arXiv 2104.03413).

The paper looks for a perturbation without high frequencies that leads a network to the target
class. Here it is a sum of the lowest cosines of each channel, found by gradient descent against a
small network that the attacker trained on clean images, and scaled to `STRENGTH`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attack import Craft
from .dct import waves
from .surrogate import surrogate

FREQUENCIES = 4
STRENGTH = 0.15  # largest change of a pixel
STEPS = 60


def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
    """One pattern for all images."""
    model = surrogate(images, labels, seed)
    rows, columns = (waves(side)[:, :FREQUENCIES] for side in images.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, FREQUENCIES, FREQUENCIES, generator=generator).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    others = images[labels != target][:200]
    for _ in range(STEPS):
        loss = -F.log_softmax(model(others + _pattern(weights, rows, columns)), 1)[:, target]
        (weights.grad,) = torch.autograd.grad(loss.mean(), [weights])
        optimizer.step()
    pattern = _pattern(weights, rows, columns).detach()
    return Craft(lambda images: (images + pattern).clamp(0, 1))


def _pattern(weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    pattern = rows @ weights @ columns.T
    return STRENGTH * pattern / pattern.abs().amax()
