"""Rank statistics: how two figures of the same neurons go together, and who deviates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAD_OF_NORMAL = 1.4826  # standard deviation of a normal distribution, in median deviations


def pearson(x: Array, y: Array) -> Array:
    """Pearson's correlation along the last axis; NaN where one side is constant."""
    return _cosine(x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True))


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation along the last axis; equal values have their mean rank."""
    return pearson(ranks(x), ranks(y))


def log_pearson(x: Array, y: Array) -> Array:
    """Pearson's correlation of ``log |x|`` and ``log |y|``, without pairs that hold a 0.

    Parameters
    ----------
    x, y
        (K,) and (B, K).

    Returns
    -------
    Array
        (B,).
    """
    used = (x != 0) & (y != 0)
    count = used.sum(-1, keepdims=True).clip(1)

    def centred(values: Array) -> Array:
        with np.errstate(divide="ignore"):
            logs = np.where(used, np.log(np.abs(values)), 0)
        return np.where(used, logs - logs.sum(-1, keepdims=True) / count, 0)

    return _cosine(centred(np.broadcast_to(x, y.shape)), centred(y))


def kendall(x: Array, y: Array) -> Array:
    """Kendall's tau-b of x (K,) and every row of y (B, K); NaN for less than 3 values."""
    if len(x) < 3:
        return np.full(len(y), np.nan)
    from scipy.stats import kendalltau  # slow to import

    found = [kendalltau(x, row, method="asymptotic").statistic for row in y]
    return np.array(found, dtype=np.float64)


def ranks(values: Array) -> Array:
    """Ranks from 1 along the last axis; equal values have their mean rank."""
    from scipy.stats import rankdata  # slow to import

    return np.asarray(rankdata(values, axis=-1), dtype=np.float64)


def deviations(magnitude: Array, saliency: Array) -> Array:
    """Rank by magnitude minus rank by saliency, each as a share of the neurons; in (-1, 1).

    Positive: larger than the clean loss accounts for.
    """
    return (ranks(magnitude) - ranks(saliency)) / max(1, len(magnitude))


def robust_z(values: Array) -> Array:
    """Distance from the median in robust standard deviations.

    These are 1.4826 times the median distance, and at least ``1 / K`` for K values: a rank.
    """
    if not len(values):
        return values
    distance = values - np.median(values)
    scale = MAD_OF_NORMAL * np.median(np.abs(distance))
    return distance / max(float(scale), 1 / len(values))


def resampled_means(samples: Array, counts: Array) -> Array:
    """Mean over samples (N, K) drawn as often as every row of counts (B, N) says; (B, K).

    NaN marks what was not measured; it does not count.
    """
    measured = np.isfinite(samples)
    if measured.all():
        return counts @ samples / counts.sum(1, keepdims=True)
    sums, drawn = counts @ np.where(measured, samples, 0), counts @ measured.astype(np.float64)
    return np.divide(sums, drawn, out=np.full_like(sums, np.nan), where=drawn > 0)


def draws(samples: int, repeats: int, seed: int) -> Array:
    """How often every sample is drawn, (repeats, samples), with replacement."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(samples, np.full(samples, 1 / samples), repeats)
    return counts.astype(np.float64)


def interval(values: Array) -> tuple[float, float]:
    """The middle 95 % of what a bootstrap found; NaN where it found nothing."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _cosine(x: Array, y: Array) -> Array:
    above, below = (x * y).sum(-1), np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
