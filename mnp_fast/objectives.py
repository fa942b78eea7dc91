"""The mask objective: clean preserving, recovery of the exposed network, weight penalty.

``alpha * L(F_m(x; theta), y) + (1 - alpha) * L(exposed F_m(x), y) + lambda * penalty(m)`` with the
cross-entropy L. With exposure by weights and alpha = lambda = 0 it is the recovering step of RNP
(arXiv 2305.14876).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import mask_update_
from .seeds import FIT, seeded
from .stats import magnitudes
from .wrap import masks

if TYPE_CHECKING:
    from .config import DefenseConfig
    from .data import CleanSet
    from .exposure import OffsetExposure, WeightExposure


def exposed_loss(
    masked: nn.Module,
    exposure: OffsetExposure | WeightExposure,
    images: Tensor,
    labels: Tensor,
    step: int,
    alpha: float,
) -> Tensor:
    """Clean preserving and recovery on a batch, weighted by alpha, in nats."""
    parts = []
    if alpha > 0:
        parts.append(alpha * F.cross_entropy(masked(images), labels))
    if alpha < 1:
        exposed = exposure.logits(images, step)
        parts.append((1 - alpha) * F.cross_entropy(exposed, labels))
    return torch.stack(parts).sum()


class MaskFit:
    """Projected SGD on the masks of a wrapped network.

    The penalty is ``layers * sum <m, M> / sum M`` with the neurons' l1 magnitudes M, so that
    lambda means the same for networks of any size.

    Parameters
    ----------
    masked
        The wrapped network, in eval mode; only its masks take gradients. They are changed in place.
    exposure
        What the masks are fitted against.
    data
        The clean set.
    config
        Its `alpha`, `weight_penalty`, `fit_*` and `seed`.
    """

    def __init__(
        self,
        masked: nn.Module,
        exposure: OffsetExposure | WeightExposure,
        data: CleanSet,
        config: DefenseConfig,
    ) -> None:
        self.masked, self.exposure, self.data, self.config = masked, exposure, data, config
        self.masks = list(masks(masked).values())
        self.velocities = [torch.zeros_like(mask) for mask in self.masks]
        norms = magnitudes(masked)
        total = torch.stack([norm.sum() for norm in norms.values()]).sum()
        scale = len(norms) / total.clamp(min=torch.finfo(total.dtype).eps)
        self.magnitudes = [
            (norm * scale).to(mask.dtype)
            for norm, mask in zip(norms.values(), self.masks, strict=True)
        ]

    def epoch(self, number: int) -> float:
        """One pass over the clean set; returns the mean objective."""
        config, processes, total = self.config, self.data.processes, 0.0
        self.exposure.renew(number)
        batches = self.data.batches(config.fit_batch_size, config.seed, FIT, number)
        with seeded(self.data.images.device, config.seed, FIT, number):
            for index, batch in enumerate(batches):
                addends = []
                for (images, labels), share in processes.parts(*batch):
                    part = share * exposed_loss(
                        self.masked,
                        self.exposure,
                        images,
                        labels,
                        number * len(batches) + index,
                        config.alpha,
                    )
                    own = torch.autograd.grad(part, self.masks, materialize_grads=True)
                    addends.append([*own, part])
                *grads, loss = processes.sum(addends)
                penalty = self.penalty()
                mask_update_(
                    [mask.detach() for mask in self.masks],
                    grads,
                    self.velocities,
                    self.magnitudes,
                    lr=config.fit_lr,
                    momentum=config.fit_momentum,
                    penalty=config.weight_penalty,
                )
                total += (loss.item() + config.weight_penalty * penalty) * len(batch[0])
        processes.equalize([*self.masks, *self.velocities])
        return total / len(self.data)

    @torch.no_grad()
    def penalty(self) -> float:
        """The magnitude that the masks keep, between 0 and the number of layers."""
        pairs = zip(self.masks, self.magnitudes, strict=True)
        return sum(float((mask * magnitude).sum()) for mask, magnitude in pairs)
