"""Per-neuron statistics of a model: magnitude, saliency, and how the two go together."""

from .ablation import ablation
from .magnitude import MAGNITUDES, magnitudes
from .neurons import (
    FEWEST,
    SALIENCIES,
    Correlation,
    Estimate,
    LayerStats,
    NeuronStats,
    neuron_stats,
)
from .saliency import Saliency, saliency

__all__ = [
    "FEWEST",
    "MAGNITUDES",
    "SALIENCIES",
    "Correlation",
    "Estimate",
    "LayerStats",
    "NeuronStats",
    "Saliency",
    "ablation",
    "magnitudes",
    "neuron_stats",
    "saliency",
]
