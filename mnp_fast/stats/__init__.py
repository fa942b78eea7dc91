"""Per-neuron statistics of a model: magnitude, saliency, and how the two go together."""

from .magnitude import MAGNITUDES, magnitudes
from .saliency import Saliency, saliency

__all__ = ["MAGNITUDES", "Saliency", "magnitudes", "saliency"]
