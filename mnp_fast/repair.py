"""What a cut leaves of a conspicuous backdoor is repaired in norms and biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from .objectives import exposed_loss
from .seeds import REPAIR, seeded
from .wrap import masks

if TYPE_CHECKING:
    from .config import DefenseConfig
    from .data import CleanSet
    from .exposure import OffsetExposure

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the way from the vectors before to those after
SLACK = 2.0  # percent of images by which the success of the exposure may be higher after a part


class Repair:
    """Tunes the vectors of a wrapped network on its clean set, clean and exposed.

    The objective is that of `mnp_fast.objectives` without the penalty; in place of the masks,
    which stay as they are, it moves every parameter of one dimension: scales and shifts of norms,
    and biases. Weights of convolutions and products stay too.

    Parameters
    ----------
    masked
        The wrapped network, in eval mode; its vectors are changed in place.
    exposure
        What it is tuned against.
    data
        The clean set.
    config
        Its `repair_*`, `fit_batch_size` and `seed`.
    """

    def __init__(
        self,
        masked: nn.Module,
        exposure: OffsetExposure,
        data: CleanSet,
        config: DefenseConfig,
    ) -> None:
        self.masked, self.exposure, self.data, self.config = masked, exposure, data, config
        self.masks = list(masks(masked).values())
        known = {id(mask) for mask in self.masks}
        self.vectors = [p for p in masked.parameters() if p.dim() == 1 and id(p) not in known]
        self.before = [vector.detach().clone() for vector in self.vectors]

    def epochs(self) -> Iterator[float]:
        """An epoch for every item taken: its mean objective in nats. None without vectors."""
        if not self.vectors:
            return
        config, data, processes = self.config, self.data, self.data.processes
        optimizer = torch.optim.Adam(self.vectors, lr=config.repair_lr)
        for epoch in range(config.repair_epochs):
            total, batches = 0.0, data.batches(config.fit_batch_size, config.seed, REPAIR, epoch)
            with self._vectors_only(), seeded(data.images.device, config.seed, REPAIR, epoch):
                for index, batch in enumerate(batches):
                    step, addends = epoch * len(batches) + index, []
                    for (images, labels), share in processes.parts(*batch):
                        part = share * exposed_loss(
                            self.masked, self.exposure, images, labels, step, config.repair_alpha
                        )
                        own = torch.autograd.grad(part, self.vectors, materialize_grads=True)
                        addends.append([*own, part])
                    *grads, loss = processes.sum(addends)
                    for vector, grad in zip(self.vectors, grads, strict=True):
                        vector.grad = grad
                    optimizer.step()
                    total += loss.item() * len(batch[0])
            processes.equalize(self.vectors)
            yield total / len(data)

    @torch.no_grad()
    def shorten(self) -> None:
        """Go back, at most half of the straight way, as far as the exposure stays stopped as well.

        A shorter way costs less accuracy on images that the clean set does not have.
        """
        after = [vector.clone() for vector in self.vectors]
        limit = self.exposure.success() + SLACK
        for share in SHARES:
            for vector, start, end in zip(self.vectors, self.before, after, strict=True):
                vector.copy_(start.lerp(end, share))
            if self.exposure.success() <= limit:
                return

    @torch.no_grad()
    def undo(self) -> None:
        """Set the vectors back to what they were."""
        for vector, before in zip(self.vectors, self.before, strict=True):
            vector.copy_(before)

    @contextmanager
    def _vectors_only(self) -> Iterator[None]:
        """Gradients for the vectors, none for the masks, inside the block."""
        self._require(vectors=True)
        try:
            yield
        finally:
            self._require(vectors=False)

    def _require(self, *, vectors: bool) -> None:
        for mask in self.masks:
            mask.requires_grad_(not vectors)
        for vector in self.vectors:
            vector.requires_grad_(vectors)
            vector.grad = None
