"""What a defense returns: plain data, so that reports and other programs need nothing else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .config import DefenseConfig


@dataclass(frozen=True)
class PrunedNeuron:
    """A neuron set to zero: the masked layer's name, its index there, its fitted mask in [0, 1]."""

    layer: str
    index: int
    mask: float


@dataclass(frozen=True)
class CutPoint:
    """The model's quality on the clean set once the `pruned` neurons of lowest mask are gone.

    `accuracy` is in percent, `loss` is the mean cross-entropy in nats, `exposed` the percent of
    clean images that the exposure still sends to the suspect class.
    """

    pruned: int
    accuracy: float
    loss: float
    exposed: float


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a phase (`"suppress"`, `"fit"` or `"repair"`), counted through all suppressions.

    `loss` is the phase's objective in nats (for `"suppress"` the clean loss, negated), `accuracy`
    the clean accuracy in percent after the epoch of the model the phase works on, `seconds` the
    epoch's duration.
    """

    phase: str
    epoch: int
    loss: float
    accuracy: float
    seconds: float


@dataclass
class LayerNeurons:
    """Per-neuron figures of one masked layer, float32 tensors (C,) on the CPU.

    `mask` is the fitted mask in [0, 1], `magnitude` the l1 norm of the neuron's weights and
    `saliency` the absolute first-order Taylor estimate of the clean loss's change at mask 0.
    """

    mask: Tensor
    magnitude: Tensor
    saliency: Tensor


@dataclass
class DefenseResult:
    """The outcome of `mnp_fast.defend`.

    Attributes
    ----------
    model
        The purified network: a plain torch module of the given model's class; mnp_fast is not
        needed to run it.
    neurons
        Figures of every neuron, by name of the masked layer.
    pruned
        The neurons that were cut, lowest mask first.
    curve
        Quality on the clean set against neurons cut, in increasing order of `pruned`.
    cut
        The point of `curve` that was chosen.
    repaired
        Quality on the clean set after the repair, if there was one: the suspect was conspicuous.
        None if scales, shifts and biases are as they were.
    target
        The suspect class: the nearest by offset and suppression, or with exposure by weights the
        one that suppressed weights favour most. None if an offset away from all classes is what
        is suspect.
    conspicuous
        Whether it is so near beside the others that a backdoor is likely.
    offset_sizes
        By suspect class, the size of the offset that leads to it, as root mean square in units of
        the images' range of values; infinite where none was found. Empty with exposure by weights.
    untargeted_size
        Size of the offset that leads away from all classes; None if it was not searched.
    untargeted_spread
        How evenly it sends images to all classes, in [0, 1]; None likewise.
    drift_favours
        By class, the mean softmax over other classes' images of the network moved along the drift
        of its batch norms; NaN for a class without other images. Empty without such norms.
    drift_agreement
        How far an offset away from all classes that follows the drift agrees with it, a cosine in
        [-1, 1]; None if it was not searched.
    drift_spread
        How evenly that one sends images to all classes, in [0, 1]; None likewise.
    history
        One record an epoch.
    seconds
        Duration of each phase, by name.
    config
        The configuration that was used.
    """

    model: nn.Module
    neurons: dict[str, LayerNeurons]
    pruned: list[PrunedNeuron]
    curve: list[CutPoint]
    cut: CutPoint
    repaired: CutPoint | None
    target: int | None
    conspicuous: bool
    offset_sizes: dict[int, float]
    untargeted_size: float | None
    untargeted_spread: float | None
    drift_favours: dict[int, float]
    drift_agreement: float | None
    drift_spread: float | None
    history: list[EpochRecord]
    seconds: dict[str, float]
    config: DefenseConfig

    @property
    def masks(self) -> dict[str, Tensor]:
        """The fitted masks, by name of the masked layer, before the cut."""
        return {name: layer.mask for name, layer in self.neurons.items()}

    @property
    def suspect(self) -> str:
        """The suspect class in words."""
        return "all classes" if self.target is None else f"class {self.target}"

    def outcome(self) -> str:
        """What was pruned and what it cost on the clean set, in a sentence or two."""
        total = sum(len(mask) for mask in self.masks.values())
        if not self.pruned and self.repaired is None:
            if self.conspicuous:
                return (
                    f"None of {total:,} neurons pruned, but there is a suspect ({self.suspect}): "
                    "it is conspicuous, and nothing within the limits stops its offset."
                )
            return (
                f"None of {total:,} neurons pruned: no small set of them carries what was exposed "
                f"({self.suspect})."
            )
        after = self.repaired or self.cut
        return (
            f"{len(self.pruned):,} of {total:,} neurons pruned"
            f"{' and the rest repaired' if self.repaired else ''} (suspect: {self.suspect}); "
            f"accuracy on the clean set {self.curve[0].accuracy:.1f} % before, "
            f"{after.accuracy:.1f} % after."
        )

    def summary(self) -> dict[str, Any]:
        """All but the tensors and the model, ready for JSON."""
        return {
            "pruned": [asdict(neuron) for neuron in self.pruned],
            "cut": asdict(self.cut),
            "repaired": None if self.repaired is None else asdict(self.repaired),
            "target": self.target,
            "conspicuous": self.conspicuous,
            "offset_sizes": {
                str(label): size if math.isfinite(size) else None
                for label, size in self.offset_sizes.items()
            },
            "untargeted_size": self.untargeted_size,
            "untargeted_spread": self.untargeted_spread,
            "drift_favours": {
                str(label): None if math.isnan(given) else given
                for label, given in self.drift_favours.items()
            },
            "drift_agreement": self.drift_agreement,
            "drift_spread": self.drift_spread,
            "curve": [asdict(point) for point in self.curve],
            "history": [asdict(record) for record in self.history],
            "seconds": dict(self.seconds),
            "config": asdict(self.config),
        }
