"""Reconstructive neuron pruning (arXiv 2305.14876).

The clean loss is maximised until the clean accuracy is at most 20 %; then masks of the norms are
fitted to undo that. Backdoor neurons, which the unlearning leaves alone, get low masks. Batch norm
is in train mode throughout, as in the public code. It prints a sweep of thresholds beside the
attack's success and publishes no threshold; 0.3 is the last one in its example's log. Lengths are
in epochs of its 500 images: with 100 they are a quarter of the steps, and unlearning may stop
short.
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import Scores, below, cut, epochs, masked, ones

BATCH = 128
UNLEARN_LR, MOMENTUM, DECAY, UNLEARN_EPOCHS, MILESTONES = 0.01, 0.9, 5e-4, 20, (10, 20)
MAX_ACCURACY, MAX_GRADIENT = 0.2, 20.0
RECOVER_LR, RECOVER_EPOCHS, WEIGHT = 0.2, 20, 0.2
THRESHOLD = 0.3
BIAS = False


@cache
def scores(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Scores:
    """The masks that recover the unlearned network."""
    model = _unlearned(model, images, labels, seed).requires_grad_(False)
    masks = ones(model)
    optimizer = torch.optim.SGD(masks.values(), lr=RECOVER_LR, momentum=MOMENTUM)
    for epoch in islice(epochs(images, labels, BATCH, seed), RECOVER_EPOCHS):
        for inputs, own in epoch:
            loss = WEIGHT * F.cross_entropy(masked(model, inputs, masks), own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune masks of at most the threshold."""
    return cut(model, below(scores(model, images, labels, seed), THRESHOLD), BIAS)


def _unlearned(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    model = copy.deepcopy(model).train().requires_grad_(True)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=UNLEARN_LR, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES)
    for epoch in islice(epochs(images, labels, BATCH, seed), UNLEARN_EPOCHS + 1):
        right = 0
        for inputs, own in epoch:
            logits = model(inputs)
            right += int((logits.argmax(1) == own).sum())
            optimizer.zero_grad()
            (-F.cross_entropy(logits, own)).backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
            optimizer.step()
        schedule.step()
        if right <= MAX_ACCURACY * len(images):
            break
    return model
