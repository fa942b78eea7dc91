"""Channel Lipschitzness based pruning (arXiv 2208.03111); no images are needed.

A channel's score is the largest singular value of its filter, as a matrix of input channels by
taps, times ``|weight| / sqrt(running variance)`` of its norm. Channels more than u = 3 standard
deviations above their layer's mean are pruned. Which convolution a norm belongs to is read from the
data flow; norms behind none are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnp_fast.dataflow import data_flow

from .norms import Scores, cut, norms, outliers, standard

DEVIATIONS = 3.0
BIAS = True


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Scores:
    """Minus the channels' Lipschitz constants, relative to their layers.

    In units of a layer's standard deviation, so that layers can be compared in one order.
    """
    flow, found = data_flow(model), {}
    for name, norm in norms(model).items():
        if name in flow.norm_inputs:
            weight = model.get_submodule(flow.norm_inputs[name]).get_parameter("weight")
            assert norm.running_var is not None
            gain = norm.weight.abs() / norm.running_var.sqrt()
            found[name] = standard(-torch.linalg.matrix_norm(weight.flatten(2), 2) * gain)
    return found


def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune outliers of each layer, bias included."""
    return cut(model, outliers(scores(model, images, labels, seed), DEVIATIONS), BIAS)
