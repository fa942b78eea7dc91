"""Adversarial neuron pruning (arXiv 2110.14430).

Masks m of all norms are fitted to ``alpha * L(m) + (1 - alpha) * L(m + delta, 1 + xi)``, where
delta and xi, the perturbations of norms' weights and biases, raise the loss by one step of
projected ascent within epsilon. Batch norm is in train mode, as in the public code.
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import Scores, below, cut, epochs, masked, ones

ALPHA, EPSILON = 0.2, 0.4
LR, MOMENTUM, BATCH, ITERATIONS = 0.2, 0.9, 128, 2000
THRESHOLD = 0.2
BIAS = False  # whether the bias of a pruned channel goes with its weight


@cache
def scores(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Scores:
    """The fitted masks."""
    model = copy.deepcopy(model).train().requires_grad_(False)
    masks = ones(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(masks.values(), lr=LR, momentum=MOMENTUM)
    batches = chain.from_iterable(epochs(images, labels, BATCH, seed))
    for inputs, own in islice(batches, ITERATIONS):
        noise = [_uniform(masks, generator) for _ in range(2)]
        flat = [perturbation for kind in noise for perturbation in kind.values()]
        slopes = torch.autograd.grad(_perturbed(model, inputs, own, masks, *noise), flat)
        with torch.no_grad():
            for perturbation, slope in zip(flat, slopes, strict=True):
                perturbation.add_(EPSILON * slope.sign()).clamp_(-EPSILON, EPSILON)
                perturbation.requires_grad_(False)
        natural = F.cross_entropy(masked(model, inputs, masks), own)
        robust = _perturbed(model, inputs, own, masks, *noise)
        optimizer.zero_grad()
        (ALPHA * natural + (1 - ALPHA) * robust).backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune masks of at most the published threshold."""
    return cut(model, below(scores(model, images, labels, seed), THRESHOLD), BIAS)


def _uniform(masks: Scores, generator: torch.Generator) -> Scores:
    return {
        name: (EPSILON * (2 * torch.rand(mask.shape, generator=generator) - 1)).requires_grad_(True)
        for name, mask in masks.items()
    }


def _perturbed(
    model: nn.Module, images: Tensor, labels: Tensor, masks: Scores, delta: Scores, xi: Scores
) -> Tensor:
    scales = {name: mask + delta[name] for name, mask in masks.items()}
    shifts = {name: 1 + xi[name] for name in masks}
    return F.cross_entropy(masked(model, images, scales, shifts), labels)
