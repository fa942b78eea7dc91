"""Per-neuron statistics of a model: magnitude, saliency, and how the two go together."""

from .ablation import ablation
from .magnitude import MAGNITUDES, magnitudes
from .saliency import Saliency, saliency

__all__ = ["MAGNITUDES", "Saliency", "ablation", "magnitudes", "saliency"]
