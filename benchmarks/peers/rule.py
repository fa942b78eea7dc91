"""Another defense's order of neurons, cut by the rule of `mnp_fast.defend`.

The rule sees clean images alone: it searches offsets of the images towards suspect classes, and
cuts the fewest neurons that stop the smallest of them without costing accuracy.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from mnp_fast import DefenseConfig
from mnp_fast.data import clean_set
from mnp_fast.defend import _Defense, _State
from mnp_fast.exposure import OffsetExposure, WeightExposure
from mnp_fast.wrap import masks

from .norms import Scores


class _Ranked(_Defense):
    """`mnp_fast.defend` with given scores in place of fitted masks, from a finished search on."""

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        config: DefenseConfig,
        searched: _State,
        scores: Scores,
    ) -> None:
        super().__init__(model, clean_set(data), config, None, None)
        self.state, self.scores = copy.deepcopy(searched), scores

    def _fit(self, exposure: OffsetExposure | WeightExposure) -> None:
        found = torch.cat(list(self.scores.values()))
        with torch.no_grad():
            for name, mask in masks(self.masked).items():
                mask.fill_(1)
                if name in self.scores:
                    # Ranks, because masks are numbers in [0, 1].
                    lower = torch.searchsorted(found.sort().values, self.scores[name])
                    mask.copy_(lower / len(found))


@cache
def _searched(model: nn.Module, images: Tensor, labels: Tensor, config: DefenseConfig) -> _State:
    """The search for suspects and offsets, which no peer has a part in: once for all of them."""
    defense = _Defense(model, clean_set((images, labels)), config, None, None)
    defense._expose()
    return defense.state


def prune_by_rule(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, scores: Scores, bias: bool
) -> nn.Module:
    """The model without the neurons that the rule cuts, lowest score first.

    `bias` says whether a pruned channel's bias goes as well.
    """
    config = DefenseConfig(site="neuron" if bias else "norm", repair_epochs=0, seed=seed)
    searched = _searched(model, images, labels, config)
    return _Ranked(model, (images, labels), config, searched, scores).run().model
