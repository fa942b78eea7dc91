"""Twelve kinds of backdoor attack, each from its paper; rates and strengths are for digits.

BadNets' patch, Blended and SIG are the demo's own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mnp_fast.demo.attacks import Trigger, badnets, blend, sig

from . import (
    frequency,
    input_aware,
    label_consistent,
    low_frequency,
    quantisation,
    reflection,
    single_pixel,
    wanet,
)
from .attack import Attack, Craft, Poisoned, poison, success

__all__ = ["ATTACKS", "Attack", "Craft", "Poisoned", "poison", "success"]


def _fixed(trigger: Trigger) -> Callable[[Tensor, Tensor, int, int], Craft]:
    """The craft of a trigger that needs nothing."""

    def craft(images: Tensor, labels: Tensor, target: int, seed: int) -> Craft:
        return Craft(trigger)

    return craft


ATTACKS: dict[str, Attack] = {
    "badnets": Attack(_fixed(badnets), "arXiv 1708.06733"),
    "single-pixel": Attack(single_pixel.craft, "arXiv 1708.06733"),
    "blend": Attack(_fixed(blend), "arXiv 1712.05526"),
    "sig": Attack(_fixed(sig), "arXiv 1902.11237"),
    "wanet": Attack(wanet.craft, "arXiv 2102.10369", rate=0.2, cover_rate=0.05),
    "low-frequency": Attack(low_frequency.craft, "arXiv 2104.03413"),
    "frequency": Attack(frequency.craft, "arXiv 2111.10991"),
    "quantisation": Attack(quantisation.craft, "arXiv 2205.13383", cover_rate=0.1),
    "reflection": Attack(reflection.craft, "arXiv 2007.02343"),
    "clean-label": Attack(label_consistent.craft, "arXiv 1912.02771", rate=0.08, clean_label=True),
    "input-aware": Attack(input_aware.craft, "arXiv 2010.08138", rate=0.2, cover_rate=0.1),
    "all-to-all": Attack(_fixed(badnets), "arXiv 1708.06733", rate=0.2, all_to_all=True),
}
