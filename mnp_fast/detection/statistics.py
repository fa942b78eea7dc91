"""Candidate statistics of a backdoor: small pure functions of the evidence.

Each is one number a model, larger where a backdoor is more likely. None of them has a threshold:
those come from a calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..stats.correlation import Array, robust_z
from .evidence import Evidence

LARGEST = 0.01  # share of the neurons that count as the most deviating ones


def collapse(evidence: Evidence) -> float:
    """Softmax of the class that suppressed networks favour most, mean over suppressions; in [0, 1].

    Suppression of a backdoored network ends at the attacker's class every time, that of a clean
    one somewhere.
    """
    return float(np.nanmax(_favours(evidence).mean(0)))


def agreement(evidence: Evidence) -> float:
    """Share of the suppressions that favour the class that most of them favour; in (0, 1]."""
    winners = np.nanargmax(_favours(evidence), axis=1)
    return float(np.bincount(winners).max() / len(winners))


def quickness(evidence: Evidence) -> float:
    """Negative logarithm of the mean epochs until clean accuracy is gone."""
    return -math.log(float(np.mean(evidence.epochs)))


def nearness(evidence: Evidence) -> float:
    """Logarithm of the median offset's size over the smallest one's; at least 0."""
    sizes = _offset_sizes(evidence)
    return float(np.log(np.median(sizes) / sizes.min())) if len(sizes) > 1 else 0.0


def offset_outlier(evidence: Evidence) -> float:
    """How far the smallest offset is from the median, in robust standard deviations of logarithms.

    As the anomaly index of Neural Cleanse (Wang et al., IEEE S&P 2019), which is of masks' norms.
    """
    sizes = _offset_sizes(evidence)
    return float(-robust_z(np.log(sizes)).min()) if len(sizes) > 1 else 0.0


def decorrelation(evidence: Evidence) -> float:
    """Negative mean over layers of Spearman's correlation of magnitude and saliency; in [-1, 1]."""
    values = np.array(list(evidence.correlations.values()))
    return float(-np.nanmean(values)) if np.isfinite(values).any() else 0.0


def deviants(evidence: Evidence) -> float:
    """Mean z-score of the 1 % of neurons whose magnitude exceeds their saliency most."""
    scores = np.concatenate([np.zeros(0), *evidence.deviations.values()])
    scores = np.sort(scores[np.isfinite(scores)])[::-1]
    return float(scores[: math.ceil(LARGEST * len(scores))].mean()) if len(scores) else 0.0


STATISTICS: dict[str, Callable[[Evidence], float]] = {
    function.__name__: function
    for function in (
        collapse,
        agreement,
        quickness,
        nearness,
        offset_outlier,
        decorrelation,
        deviants,
    )
}


def _favours(evidence: Evidence) -> Array:
    return np.array(evidence.favours, dtype=np.float64)


def _offset_sizes(evidence: Evidence) -> Array:
    """Those that were found; what never moved an image says nothing."""
    sizes = np.array(list(evidence.offset_sizes.values()), dtype=np.float64)
    return sizes[np.isfinite(sizes) & (sizes > 0)]
