"""Fine-pruning (arXiv 1805.12185).

Channels of the last norm are pruned, those least active on clean images first, until the accuracy
there has fallen by more than four points; then all weights are fine-tuned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fine_tuning
from .norms import Scores, cut, norms

DROP = 4.0  # points
BIAS = True


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Scores:
    """The mean activation, behind a ReLU, of each channel of the norm that runs last."""
    latest: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        latest.clear()
        latest[name] = output

    hooks = [
        norm.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        for name, norm in norms(model).items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return {name: F.relu(output).mean((0, 2, 3)) for name, output in latest.items()}


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune as much of the last norm as the clean images bear, and fine-tune."""
    ((name, activity),) = scores(model, images, labels, seed).items()
    least, best = _accuracy(model, images, labels) - DROP, model
    order = activity.argsort()
    gone = torch.zeros_like(activity, dtype=torch.bool)
    for channel in order[:-1]:
        gone[channel] = True
        pruned = cut(model, {name: gone}, BIAS)
        if _accuracy(pruned, images, labels) < least:
            break
        best = pruned
    return tuned(best, images, labels, seed)


def tuned(pruned: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Fine-tuned, with what was pruned kept at zero."""
    gone = {name: norm.weight == 0 for name, norm in norms(pruned).items()}
    return cut(fine_tuning.defend(pruned, images, labels, seed), gone, BIAS)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).double().mean().item()
