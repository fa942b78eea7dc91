"""Plain fine-tuning of all weights on the clean images; settings as public benchmarks have them."""

from __future__ import annotations

import copy
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import epochs

LR, MOMENTUM, DECAY, BATCH, EPOCHS = 0.01, 0.9, 5e-4, 128, 100


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train a copy, batch norm in train mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    model = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for epoch in islice(epochs(images, labels, BATCH, seed), EPOCHS):
        for inputs, own in epoch:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), own).backward()
            optimizer.step()
    for name, module in model.named_modules():
        module.training = modes[name]
    return model
