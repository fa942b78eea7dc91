"""Two ways to expose the backdoor, which the masks are then fitted against.

Suppressed weights say which classes are suspect, but they are damaged beyond the backdoor, and
masks fitted to repair them prune neurons that clean images need. An offset of the images leaves the
weights alone and reaches its class by the shortest way: the backdoor's own where there is one, so
that the suspect with the smallest offset is the attacker's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import predict
from .wrap import masked_layers, masks, wrap

if TYPE_CHECKING:
    from .config import DefenseConfig
    from .data import CleanSet
    from .drift import Drift

MARGIN = 2.0  # logits by which a searched offset shall make its class overtake all others
POOL = 3  # offsets kept: masks that stop only the last one found let earlier ones work again
REACHED = 50.0  # percent of images that an offset must send to its class to count
WIDENED = 1.5  # factor on the first offset in `success`: a cut shall stop more than was seen


class WeightExposure:
    """The network with suppressed weights, under the same masks (the paper's way).

    Parameters
    ----------
    masked
        The wrapped network; the exposed one shares its masks.
    suppressed
        The plain network after `mnp_fast.suppression.suppress`.
    data
        The clean set.
    target
        The suspect class.
    config
        Its `site`.
    """

    def __init__(
        self,
        masked: nn.Module,
        suppressed: nn.Module,
        data: CleanSet,
        target: int,
        config: DefenseConfig,
    ) -> None:
        self.others, self.target = data.images[data.labels != target], target
        self.processes = data.processes
        self.model = wrap(suppressed, config.site, example_inputs=(data.images[:2],))
        self.model.eval().requires_grad_(False)
        for layer, mask in zip(
            masked_layers(self.model).values(), masks(masked).values(), strict=True
        ):
            layer.mask = mask

    def renew(self, epoch: int) -> None:
        """Nothing: the suppressed weights stay."""

    def logits(self, images: Tensor, step: int) -> Tensor:
        """What the exposed network makes of a batch."""
        return self.model(images)

    def success(self) -> float:
        """Percent of other classes' images that the exposed network takes for the suspect class."""
        return _share(predict(self.model, self.others, self.processes), self.target)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`."""


class OffsetExposure:
    """The masked network given its images plus an offset that leads to the suspect class.

    The offsets are searched anew as the masks change, so that masks cannot merely dodge one.

    Parameters
    ----------
    masked
        The wrapped network; only its masks may take gradients.
    data
        The clean set.
    target
        The suspect class; None for an offset that leads away from every image's own class,
        whatever to.
    config
        Its `offset_*`.
    """

    def __init__(
        self, masked: nn.Module, data: CleanSet, target: int | None, config: DefenseConfig
    ) -> None:
        self.model, self.config, self.target = masked, config, target
        others = torch.ones_like(data.labels).bool() if target is None else data.labels != target
        self.others, self.labels = data.images[others], data.labels[others]
        self.processes = data.processes
        self.low, self.high = (float(bound) for bound in data.images.aminmax())
        self.reach = max(self.high - self.low, torch.finfo(data.images.dtype).tiny)
        self.first = torch.zeros_like(data.images[:1])
        self.offsets = [self.first]
        self.guide: Drift | None = None
        self.guided: Tensor | None = None

    def start(self) -> float:
        """Search the first offset; returns its size, infinite where it does not succeed.

        The size is the root of the offset's mean square, in units of the images' range.
        """
        self.first = self._search(self.config.offset_steps)
        self.offsets = [self.first]
        return self._size(self.first)

    def follow(self, drift: Drift) -> float:
        """Search offsets that agree with a drift from now on; the agreement of the first of them.

        It starts from the offset that `start` found, and all later ones from it in place of zero.
        """
        self.guide = drift
        self.guided = self._search(self.config.offset_steps, self.first)
        self.offsets = [self.guided, self.first]
        with torch.no_grad():
            _, before = drift.means(self.others)
            _, after = drift.means(self._shifted(self.others, self.guided))
            return drift.agreement(before, after).item()

    def again(self) -> None:
        """Search as `start` does, and keep what is found beside the last offsets."""
        self._keep(self._search(self.config.offset_steps, self.guided))

    def renew(self, epoch: int) -> None:
        """Search once more, before every epoch but 0; every other time from the offset before."""
        if epoch == 0:
            return
        steps = self.config.offset_steps
        if epoch % 2:
            found = self._search(steps // 2, self.guided)
        else:
            found = self._search(steps // (6 if self.guide is None else 3), self.offsets[-1])
        self._keep(found)

    def logits(self, images: Tensor, step: int) -> Tensor:
        """What the network makes of a batch under one of the offsets, in turn."""
        return self.model(self._shifted(images, self.offsets[step % len(self.offsets)]))

    def success(self) -> float:
        """Percent of other classes' images that the first offset, widened, sends to the class."""
        return self._reached(WIDENED * self.first)

    def spread(self, offset: Tensor) -> float:
        """How evenly an offset (1, *) sends images to classes not their own, in [0, 1].

        The entropy of those classes over the logarithm of their number; 0 where all go to one.
        """
        shifted = self._shifted(self.others, offset)
        logits = predict(self.model, shifted, self.processes)
        chosen = logits.argmax(1)
        counts = chosen[chosen != self.labels].bincount(minlength=logits.shape[1]).double()
        shares = counts / counts.sum().clamp(min=1)
        return torch.special.entr(shares).sum().item() / math.log(max(logits.shape[1], 2))

    def images(self) -> Tensor:
        """The other classes' images under the first offset."""
        return self._shifted(self.others, self.first)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"first": self.first, "offsets": self.offsets, "guided": self.guided}

    def load(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`."""
        device = self.others.device
        self.first = state["first"].to(device)
        self.offsets = [offset.to(device) for offset in state["offsets"]]
        self.guided = None if state["guided"] is None else state["guided"].to(device)

    def _shifted(self, images: Tensor, offset: Tensor) -> Tensor:
        # Not clamp: torch 2.14 stops its gradient at the bounds, where backgrounds often are.
        shifted = images + offset
        shifted = torch.where(shifted < self.low, self.low, shifted)
        return torch.where(shifted > self.high, self.high, shifted)

    def _keep(self, offset: Tensor) -> None:
        self.offsets = [*self.offsets, offset][-POOL:]

    def _reached(self, offset: Tensor) -> float:
        """Percent of other classes' images that an offset sends to the class."""
        logits = predict(self.model, self._shifted(self.others, offset), self.processes)
        if self.target is None:
            return 100 * (logits.argmax(1) != self.labels).double().mean().item()
        return _share(logits, self.target)

    def _size(self, offset: Tensor) -> float:
        size = self._mean_square(offset).sqrt().item()
        return size if self._reached(offset) >= REACHED else math.inf

    def _mean_square(self, offset: Tensor) -> Tensor:
        return (offset / self.reach).square().mean()

    def _search(self, steps: int, start: Tensor | None = None) -> Tensor:
        """An offset (1, *), small in mean square, by clean suppression with decay.

        Adam on a hinge that asks the suspect class to overtake all others by `MARGIN` (without
        one, any class to overtake the image's own), plus `offset_decay` times the offset's mean
        square in units of the images' range, plus `drift_weight` times what the offset lacks of
        agreement with the drift that it follows.
        """
        offset = torch.zeros_like(self.others[:1]) if start is None else start.clone()
        offset.requires_grad_(True)
        optimizer = torch.optim.Adam([offset], lr=self.config.offset_lr * self.reach)
        parts = self.processes.parts(self.others, self.labels)
        with _constant(list(masks(self.model).values())):
            befores = [self._means(images) for (images, _), _ in parts]
            for _ in range(steps):
                losses = [
                    share * self._distance(images, labels, offset, before)
                    for ((images, labels), share), before in zip(parts, befores, strict=True)
                ]
                addends = [torch.autograd.grad(loss, [offset]) for loss in losses]
                (offset.grad,) = self.processes.sum(addends)
                optimizer.step()
        self.processes.equalize([offset])
        return offset.detach()

    @torch.no_grad()
    def _means(self, images: Tensor) -> Tensor | None:
        """Those that the drift is compared with, where one is followed."""
        return None if self.guide is None else self.guide.means(images)[1]

    def _distance(
        self, images: Tensor, labels: Tensor, offset: Tensor, before: Tensor | None
    ) -> Tensor:
        """What the search makes small: the hinge, the offset's size, disagreement with a drift."""
        shifted = self._shifted(images, offset)
        if self.guide is None or before is None:
            return self._reluctance(self.model(shifted), labels) + self._decay(offset)
        logits, after = self.guide.means(shifted)
        weight = self.config.drift_weight * self.guide.trust
        disagreement = weight * (1 - self.guide.agreement(before, after))
        return self._reluctance(logits, labels) + self._decay(offset) + disagreement

    def _reluctance(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The hinge: how far images are from going where the offset shall send them."""
        chosen = F.one_hot(
            labels if self.target is None else torch.full_like(labels, self.target),
            logits.shape[1],
        ).bool()
        of_class, rivals = logits[chosen], logits.masked_fill(chosen, -torch.inf).amax(1)
        behind = of_class - rivals if self.target is None else rivals - of_class
        return (behind + MARGIN).relu().mean()

    def _decay(self, offset: Tensor) -> Tensor:
        return self.config.offset_decay * self._mean_square(offset)


def _share(logits: Tensor, target: int) -> float:
    return 100 * (logits.argmax(1) == target).double().mean().item()


@contextmanager
def _constant(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients for the parameters inside the block."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
