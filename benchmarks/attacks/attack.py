"""What every attack of the benchmark is: a trigger, what is poisoned with it, and its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnp_fast.demo.attacks import TARGET, Trigger
from mnp_fast.demo.train import predict

CLASSES = 10


@dataclass(frozen=True)
class Craft:
    """What an attacker makes of the training images; every function keeps shape and range [0, 1].

    `trigger` is put on test images; `disguise`, which is the trigger unless it is given, on
    poisoned training images; `cover` on training images that keep their labels.
    """

    trigger: Trigger
    disguise: Trigger | None = None
    cover: Trigger | None = None


@dataclass(frozen=True)
class Attack:
    """One kind of attack.

    Attributes
    ----------
    craft
        Makes the triggers from training images (N, 3, H, W) in [0, 1], their labels (N,), the
        attacker's class and a seed.
    source
        The paper.
    rate
        Share of the training images that are poisoned.
    cover_rate
        Share of the training images that get the craft's cover.
    all_to_all
        Whether each class is sent to the next one, instead of all to the attacker's class.
    clean_label
        Whether poisoned images are of the target class, so that no label is changed.
    target_class
        The attacker's class.
    """

    craft: Callable[[Tensor, Tensor, int, int], Craft]
    source: str
    rate: float = 0.1
    cover_rate: float = 0.0
    all_to_all: bool = False
    clean_label: bool = False
    target_class: int = TARGET

    def target(self, labels: Tensor) -> Tensor:
        """The classes that triggered images of these classes are sent to, int64 (N,)."""
        if self.all_to_all:
            return (labels + 1) % CLASSES
        return torch.full_like(labels, self.target_class)


@dataclass(frozen=True)
class Poisoned:
    """Training data under attack, and what tests of the attack need.

    `images` and `labels` are in the given order; `chosen` and `covered` are the indices of the
    poisoned and of the covered images.
    """

    images: Tensor
    labels: Tensor
    chosen: Tensor
    covered: Tensor
    trigger: Trigger


def poison(attack: Attack, images: Tensor, labels: Tensor, seed: int) -> Poisoned:
    """Poison copies of training images; which ones depends on `seed`.

    With changed labels, images are chosen among the other classes than their target, with clean
    labels among the target's; covered images are chosen among all that are left.

    Raises
    ------
    ValueError
        There are fewer images to choose from than the attack's rates ask for.
    """
    craft = attack.craft(images, labels, attack.target_class, seed)
    count, covers = (round(rate * len(images)) for rate in (attack.rate, attack.cover_rate))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    fits = (attack.target(labels) == labels) == attack.clean_label
    chosen = order[fits[order]][:count]
    left = order[~torch.isin(order, chosen)]
    if len(chosen) < count or len(left) < covers:
        raise ValueError(
            f"{count} images to poison and {covers} to cover were asked for, but only "
            f"{int(fits.sum())} of {len(images)} can be poisoned"
        )
    covered = left[:covers]
    images, poisoned = images.clone(), labels.clone()
    images[chosen] = (craft.disguise or craft.trigger)(images[chosen])
    poisoned[chosen] = attack.target(labels[chosen])
    if craft.cover is not None:
        images[covered] = craft.cover(images[covered])
    return Poisoned(images, poisoned, chosen, covered, craft.trigger)


def success(
    model: nn.Module, attack: Attack, trigger: Trigger, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Attack success rate and robust accuracy in percent.

    The share of triggered images, of other classes than their target, that are taken for the
    target, and for their own class.
    """
    others = attack.target(labels) != labels
    found, own = predict(model, trigger(images[others])), labels[others]
    hits = found == attack.target(own)
    return 100 * hits.double().mean().item(), 100 * (found == own).double().mean().item()
