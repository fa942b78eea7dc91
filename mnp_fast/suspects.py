"""Which class is the attacker's, by what suppression favours and what the shortest offset reaches.

A backdoor is a short way to its class, and what a network falls for once clean features are gone.
Each sign alone misleads now and then; together they rarely do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DefenseConfig

# What an offset counts less, of the median size, if suppressed weights give all to its class: by
# few suppressions, and by more of them.
FAVOUR, FAVOUR_AGAIN = 0.25, 1.0
DOUBT = 0.12  # beyond `conspicuous_again`, within which it is worth to suppress again
SPREAD = 0.5  # what an offset counts less if it sends images to all classes alike
SPREAD_OUT = 0.7  # least spread of one that follows the drift, for it to be no class's trigger
RIVALS = 4  # other suspects without which a size says nothing


def distances(
    sizes: Mapping[int, float], favours: Mapping[int, float], weight: float = FAVOUR
) -> dict[int, float]:
    """How far each suspect class is, small for an attacker's.

    The size of its offset over the median of the others', minus `weight` times the softmax, in
    [0, 1], that suppressed weights give it. Infinite where no offset was found.
    """
    found = {}
    for label, size in sizes.items():
        others = [other for rival, other in sizes.items() if rival != label]
        relative = size / statistics.median(others) if others and math.isfinite(size) else size
        found[label] = relative - weight * favours[label]
    return found


def can_tell(sizes: Mapping[int, float]) -> bool:
    """Whether there are enough suspects for one to be conspicuous."""
    return len(sizes) > RIVALS


def is_conspicuous(
    sizes: Mapping[int, float], favours: Mapping[int, float], config: DefenseConfig
) -> bool:
    """Whether the nearest class is so near, beside at least `RIVALS` others, that one suspects."""
    return can_tell(sizes) and min(distances(sizes, favours).values()) <= config.conspicuous


def is_doubtful(
    sizes: Mapping[int, float], favours: Mapping[int, float], config: DefenseConfig
) -> bool:
    """Whether more suppressions might make a suspect conspicuous that is not."""
    limit = config.conspicuous_again + DOUBT
    return can_tell(sizes) and min(distances(sizes, favours, FAVOUR_AGAIN).values()) <= limit


def conspicuous_again(
    sizes: Mapping[int, float], favours: Mapping[int, float], config: DefenseConfig
) -> int | None:
    """The class that is conspicuous by what more suppressions favour, if there is one."""
    found = distances(sizes, favours, FAVOUR_AGAIN)
    nearest = min(found, key=found.__getitem__)
    return nearest if found[nearest] <= config.conspicuous_again else None


def conspicuous_by_both(
    sizes: Mapping[int, float],
    favours: Mapping[int, float],
    drift_favours: Mapping[int, float],
    config: DefenseConfig,
) -> int | None:
    """The class that is conspicuous if what the drift gives it counts as what suppression does."""
    found = distances(sizes, {label: favours[label] + drift_favours[label] for label in sizes})
    known = {label: far for label, far in found.items() if not math.isnan(far)}
    nearest = min(known, key=known.__getitem__, default=None)
    return nearest if nearest is not None and known[nearest] <= config.conspicuous else None


def remembered(favours: Mapping[int, float], config: DefenseConfig) -> int | None:
    """The class that a network moved along its drift gives most, if that is much."""
    known = {label: given for label, given in favours.items() if not math.isnan(given)}
    most = max(known, key=known.__getitem__, default=None)
    return most if most is not None and known[most] >= config.drift_favour else None


def is_drift(agreement: float | None, spread: float | None, config: DefenseConfig) -> bool:
    """Whether an offset away from all classes is what batch norms remember of a trigger.

    By its agreement with their drift, and its spread: one that leads to few classes is the trigger
    of these.
    """
    if agreement is None or spread is None:
        return False
    return agreement >= config.drift_agreement and spread >= SPREAD_OUT


def is_untargeted(
    size: float | None, spread: float | None, sizes: Mapping[int, float], config: DefenseConfig
) -> bool:
    """Whether an offset away from all classes is conspicuous: a trigger that shifts every class.

    In a clean network it is harder to find one offset that spoils every class than one that leads
    to one class, and where it is not, it leads to that one class: nearly all images go to few
    classes. So `SPREAD` times the offset's spread, in [0, 1], makes up for a larger size.
    """
    if size is None or spread is None or not math.isfinite(size):
        return False
    return size / statistics.median(sizes.values()) - SPREAD * spread <= config.untargeted
