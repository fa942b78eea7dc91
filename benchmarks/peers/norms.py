"""What the pruning peers share: masks on batch norms in plain torch, cuts, and endless batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

Scores = dict[str, Tensor]  # by name of a batch norm, a number a channel; the lowest goes first


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms by name, in order of registration."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }


def ones(model: nn.Module) -> Scores:
    """A mask of ones for every batch norm, taking gradients."""
    return {
        name: torch.ones_like(norm.weight).requires_grad_(True)
        for name, norm in norms(model).items()
    }


def masked(
    model: nn.Module, images: Tensor, scales: Scores, shifts: Scores | None = None
) -> Tensor:
    """Logits with each norm's weight multiplied by `scales`, and its bias by `shifts`."""
    changed = {}
    for name, norm in norms(model).items():
        changed[f"{name}.weight"] = norm.weight * scales[name]
        if shifts is not None:
            changed[f"{name}.bias"] = norm.bias * shifts[name]
    return functional_call(model, changed, (images,))


@torch.no_grad()
def cut(model: nn.Module, gone: Scores, bias: bool) -> nn.Module:
    """A copy whose channels in `gone` (bool) have weight 0, and bias 0 if so asked."""
    model = copy.deepcopy(model)
    for name, norm in norms(model).items():
        if name in gone:
            norm.weight[gone[name]] = 0
            if bias:
                norm.bias[gone[name]] = 0
    return model


def below(scores: Scores, threshold: float) -> Scores:
    """The channels whose score is at most the threshold."""
    return {name: score <= threshold for name, score in scores.items()}


def outliers(scores: Scores, deviations: float) -> Scores:
    """The channels whose score is so many of their layer's standard deviations below its mean."""
    return {name: score < score.mean() - deviations * score.std() for name, score in scores.items()}


def standard(values: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1."""
    return (values - values.mean()) / values.std().clamp(min=torch.finfo(values.dtype).tiny)


def epochs(
    images: Tensor, labels: Tensor, size: int, seed: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Endless epochs of batches, their order drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        yield [(images[part], labels[part]) for part in order.split(size) if len(part) > 1]
