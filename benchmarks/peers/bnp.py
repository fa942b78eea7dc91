"""Pruning by batch statistics: BNP (Zheng et al., NeurIPS 2022).

A norm's running statistics saw the poisoned images, clean images alone give others. A channel's
score is the divergence KL(N(clean) || N(running)) of its input; channels more than u = 3 standard
deviations above their layer's mean are pruned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norms import Scores, cut, norms, outliers, standard

DEVIATIONS = 3.0
BIAS = False


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Scores:
    """Minus the channels' divergences, relative to their layers as in `clp`."""
    inputs: dict[str, Tensor] = {}
    layers = norms(model)
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, norm in layers.items()
    ]
    training = model.training
    model.eval()(images)
    model.train(training)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, norm in layers.items():
        mean, var = inputs[name].mean((0, 2, 3)), inputs[name].var((0, 2, 3)) + norm.eps
        assert norm.running_mean is not None
        assert norm.running_var is not None
        running = norm.running_var + norm.eps
        spread = (var + (mean - norm.running_mean).square()) / (2 * running)
        found[name] = standard(-((running / var).log() / 2 + spread - 0.5))
    return found


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune outliers of each layer."""
    return cut(model, outliers(scores(model, images, labels, seed), DEVIATIONS), BIAS)
