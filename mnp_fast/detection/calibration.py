"""What turns statistics into a verdict: fitted on a population of models, stored as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DefenseConfig
from ..io import atomic_path
from ..stats.correlation import Array
from .evidence import Evidence
from .statistics import STATISTICS

FORMAT = 1
OWN = Path(__file__).parent / "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A score, a threshold, and the models that they were fitted on.

    The score is ``intercept + sum_i weight_i * (statistic_i - mean_i) / scale_i``. A model is
    flagged where its score exceeds the one that a further clean model of the population exceeds
    with the probability `false_alarm_rate`, if their scores are normally distributed.

    Attributes
    ----------
    weights, means, scales
        By name of a statistic of `mnp_fast.detection.statistics`.
    intercept
        Added to the weighted sum.
    clean_scores
        Of the population's clean models, each scored by a fit that did not see it; at least 3.
    false_alarm_rate
        In (0, 1).
    population
        What it was fitted on, in words and numbers, for people to read.
    settings
        Settings of `DefenseConfig` under which the evidence was gathered, and `runs`, the number
        of suppressions.
    """

    weights: dict[str, float]
    means: dict[str, float]
    scales: dict[str, float]
    intercept: float
    clean_scores: list[float]
    false_alarm_rate: float
    population: dict[str, Any]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(STATISTICS))
        if unknown or not self.weights:
            raise ValueError(
                f"calibration: statistics must be of {', '.join(STATISTICS)}, not "
                f"{', '.join(unknown) or 'none'}"
            )
        if set(self.means) != set(self.weights) or set(self.scales) != set(self.weights):
            raise ValueError("calibration: weights, means and scales must have the same names")
        numbers = [*self.weights.values(), *self.means.values(), *self.clean_scores, self.intercept]
        if not all(map(math.isfinite, numbers)) or not all(s > 0 for s in self.scales.values()):
            raise ValueError("calibration: its numbers must be finite, and its scales positive")
        if len(self.clean_scores) < 3:
            raise ValueError(
                f"calibration: it takes at least 3 clean models, not {len(self.clean_scores)}"
            )
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(
                "calibration: false_alarm_rate must be between 0 and 1, not "
                f"{self.false_alarm_rate}"
            )

    def score(self, evidence: Evidence) -> float:
        """The weighted sum of the statistics."""
        return self.score_of({name: STATISTICS[name](evidence) for name in self.weights})

    def score_of(self, statistics: Mapping[str, float]) -> float:
        """The same, given the statistics by name."""
        return self.intercept + sum(
            weight * (statistics[name] - self.means[name]) / self.scales[name]
            for name, weight in self.weights.items()
        )

    @property
    def threshold(self) -> float:
        """The score above which a model is flagged."""
        return prediction_bound(np.array(self.clean_scores), self.false_alarm_rate)

    def config(self, seed: int = 0) -> DefenseConfig:
        """The settings, with a seed."""
        given = {name: value for name, value in self.settings.items() if name != "runs"}
        return DefenseConfig(**given, seed=seed)

    def described(self) -> str:
        """What it was fitted on, in a few words."""
        counts = self.population.get("count", {})
        numbers = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        return f"{self.population.get('models', 'an unnamed population')} ({numbers})"

    def p_value(self, score: float) -> float:
        """The probability that a further clean model of the population has a larger score."""
        scores = np.array(self.clean_scores)
        distance = (score - scores.mean()) / _spread(scores)
        return float(_student().sf(distance, len(scores) - 1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        with atomic_path(path) as temporary:
            text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str] = OWN) -> Calibration:
        """Read a file; the package's own by default.

        Raises
        ------
        ValueError
            The file is no calibration, or one of another format.
        OSError
            It cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a calibration of this version: {error}") from error


def prediction_bound(scores: Array, rate: float) -> float:
    """What one more draw from a normal distribution exceeds with a given probability.

    Student's prediction interval: it knows that mean and spread come from few scores.
    """
    quantile = _student().isf(rate, len(scores) - 1)
    return float(scores.mean() + quantile * _spread(scores))


def _spread(scores: Array) -> float:
    spread = scores.std(ddof=1) * math.sqrt(1 + 1 / len(scores))
    return float(max(spread, np.finfo(np.float64).tiny))


def _student() -> Any:
    """Student's t distribution; scipy takes longer to import than all else here."""
    from scipy.stats import t

    return t
