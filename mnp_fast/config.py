"""What a defense can be told, with its defaults and their ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .wrap import SITES

EXPOSURES = ("offset", "weights")


@dataclass(frozen=True)
class DefenseConfig:
    """Settings of `mnp_fast.defend`; what they default to was chosen on models of other seeds.

    Attributes
    ----------
    site
        What masks multiply, as in `mnp_fast.wrap`.
    exposure
        What the masks are fitted against. `"weights"`: the network with suppressed weights, as in
        the paper. `"offset"` (the project's choice): the network given its images plus an offset,
        found by suppressing clean predictions towards a class that suppressed weights favour.
    alpha
        Weight in [0, 1] of clean preserving; the exposed network has the rest.
    weight_penalty
        Lambda, at least 0: weight of the magnitude that the masks keep.
    suppressions
        So many suppressions say which classes are suspect, by their mean, each on a part of the
        clean set drawn at random (one alone on all of it). With exposure by weights one is made.
    suppress_lr
        Learning rate of the ascent on the clean loss.
    suppress_decay
        Mu, at least 0: weight of the squared norm of all parameters in the ascent.
    suppress_batch_size
        Images a step of the ascent.
    suppress_epochs
        At most so many epochs of ascent.
    suppress_accuracy
        The ascent stops once the clean accuracy is at most this, in percent.
    suspects
        At most so many classes, those that suppressed weights favour most, are searched for an
        offset; the nearest one is the suspect class (see `conspicuous`).
    offset_steps
        Steps of the first search for an offset; a renewed one takes `offset_steps // 2`, and one
        that starts from its predecessor `offset_steps // 6`.
    offset_lr
        Learning rate of the search, in units of the images' range of values.
    offset_decay
        Weight of the offset's mean square, in units of the range squared.
    fit_epochs, fit_batch_size, fit_lr, fit_momentum
        Of projected SGD on the masks.
    max_exposed
        The cut shall bring the exposure's success down to this, in percent of images.
    max_pruned
        Largest share of the neurons, in (0, 1], that may be cut; twice as many where the
        suspect is conspicuous.
    few
        So many neurons, at least 1, may be cut in any network, whatever their share: how many
        carry a backdoor depends little on how wide the network is. Twice as many as well.
    max_drop
        Largest loss of clean accuracy, in points, that cut and repair may cost on the clean set,
        and its standard error on top.
    unsure_drop
        The same where the suspect is not conspicuous though it could be.
    conspicuous
        The suspect class is conspicuous if its distance is at most this, in [0, 1]: the size of
        its offset over the median of the other suspects', less a quarter of the softmax that
        suppressed weights give it. Where nothing below finds one either, a quarter of what a
        network moved along its drift gives the class comes off as well.
    suppressions_again, conspicuous_again
        Where no class is conspicuous but one is nearly so: so many suppressions more tell better
        what they favour, and that softmax counts whole. The nearest class is conspicuous if its
        distance is at most this then, in [-1, 1]. Without more suppressions there is no second
        look.
    untargeted
        Where no class is conspicuous: an offset that leads away from all classes is, if its
        distance is at most this, in [0, 1]: its size over the median of the suspects', less half
        of how evenly, in [0, 1], it sends images to all classes.
    drift_weight, drift_favour, drift_agreement
        Of what batch norms remember of the training images (see `docs/method.md`). Offsets that a
        conspicuous backdoor is worked against shall do to the norms' means what these images did:
        the first is that agreement's weight, at least 0; with 0, drift is not looked at. Where no
        class is conspicuous otherwise, one is that a network moved along its drift gives at least
        the second, a softmax in [0, 1]; and a trigger that shifts every class is, if an offset that
        leads away from all classes to many comes to at least the third, a cosine in [-1, 1].
    repair_alpha, repair_epochs, repair_lr
        Of a repair, which follows the cut where the suspect is conspicuous: the weight in [0, 1]
        of clean preserving, and Adam's on scales and shifts of norms, and on biases. Without
        epochs there is none.
    shards
        Parts that a batch is computed in, at least 1. With the same number, results are the same
        to the last bit however many processes share the parts, with as many threads each; their
        number must be a multiple of that of the processes, or 1: one part for every process.
    seed
        Of every random order.

    Raises
    ------
    ValueError
        A value out of its range; the message names it.
    TypeError
        A value of another type.
    """

    site: str = "auto"
    exposure: str = "offset"
    alpha: float = 0.8
    weight_penalty: float = 0.3
    suppressions: int = 4
    suppress_lr: float = 0.03
    suppress_decay: float = 0.01
    suppress_batch_size: int = 128
    suppress_epochs: int = 200
    suppress_accuracy: float = 20.0
    suspects: int = 10
    offset_steps: int = 90
    offset_lr: float = 0.02
    offset_decay: float = 15.0
    fit_epochs: int = 8
    fit_batch_size: int = 25
    fit_lr: float = 0.05
    fit_momentum: float = 0.9
    max_exposed: float = 10.0
    max_pruned: float = 0.015
    few: int = 18
    max_drop: float = 3.0
    unsure_drop: float = 0.0
    conspicuous: float = 0.72
    suppressions_again: int = 8
    conspicuous_again: float = 0.42
    untargeted: float = 0.7
    drift_weight: float = 5.0
    drift_favour: float = 0.25
    drift_agreement: float = 0.83
    repair_alpha: float = 0.9
    repair_epochs: int = 20
    repair_lr: float = 0.01
    shards: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, type(field.default))
        for name, allowed in (("site", SITES), ("exposure", EXPOSURES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name, (low, high, text) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be {text}, not {value}")

    def _check_type(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, name, float(value))
        elif type(value) is not kind:
            raise TypeError(f"{name} must be of type {kind.__name__}, not {value!r}")


_TINY = math.ulp(0.0)
_BIG = 1e18
_POSITIVE = (_TINY, _BIG, "positive and finite")
_NOT_NEGATIVE = (0.0, _BIG, "at least 0 and finite")
_COUNT = (1, _BIG, "at least 1")
_RANGES: dict[str, tuple[float, float, str]] = {
    "alpha": (0.0, 1.0, "between 0 and 1"),
    "weight_penalty": _NOT_NEGATIVE,
    "suppressions": _COUNT,
    "suppress_lr": _POSITIVE,
    "suppress_decay": _NOT_NEGATIVE,
    "suppress_batch_size": (2, _BIG, "at least 2"),
    "suppress_epochs": _COUNT,
    "suppress_accuracy": (0.0, 100.0, "between 0 and 100 percent"),
    "suspects": _COUNT,
    "offset_steps": (6, _BIG, "at least 6"),
    "offset_lr": _POSITIVE,
    "offset_decay": _NOT_NEGATIVE,
    "fit_epochs": _COUNT,
    "fit_batch_size": _COUNT,
    "fit_lr": _POSITIVE,
    "fit_momentum": (0.0, 1 - 1e-9, "at least 0 and below 1"),
    "max_exposed": (0.0, 100.0, "between 0 and 100 percent"),
    "max_pruned": (_TINY, 1.0, "above 0 and at most 1"),
    "few": _COUNT,
    "max_drop": (0.0, 100.0, "between 0 and 100 points"),
    "unsure_drop": (0.0, 100.0, "between 0 and 100 points"),
    "conspicuous": (0.0, 1.0, "between 0 and 1"),
    "suppressions_again": (0, _BIG, "at least 0"),
    "conspicuous_again": (-1.0, 1.0, "between -1 and 1"),
    "untargeted": (0.0, 1.0, "between 0 and 1"),
    "drift_weight": _NOT_NEGATIVE,
    "drift_favour": (0.0, 1.0, "between 0 and 1"),
    "drift_agreement": (-1.0, 1.0, "between -1 and 1"),
    "repair_alpha": (0.0, 1.0, "between 0 and 1"),
    "repair_epochs": (0, _BIG, "at least 0"),
    "repair_lr": _POSITIVE,
    "shards": _COUNT,
    "seed": (0, 2**31 - 1, "between 0 and 2147483647"),
}
