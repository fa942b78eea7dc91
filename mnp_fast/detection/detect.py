"""Whether a model has a backdoor, from a small clean set."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DefenseConfig
from ..data import check_model, clean_set
from ..distributed import Processes
from ..progress import progress_bars
from .calibration import OWN, Calibration
from .evidence import Evidence, gather, suspect_class
from .statistics import STATISTICS

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from torch.distributed import ProcessGroup

SUSPECTS = 0.01  # share of the neurons that are named


@dataclass(frozen=True)
class SuspectNeuron:
    """A neuron: its masked layer, its index there, and its robust z-score.

    The score says how far the neuron's outputs move under the suspect class's offset, compared with
    the other neurons of the layer.
    """

    layer: str
    index: int
    z: float


@dataclass(frozen=True)
class Detection:
    """What `mnp_fast.detect` found.

    Attributes
    ----------
    score
        Of the model; larger where a backdoor is more likely. Its unit is the calibration's.
    threshold
        The score above which the verdict is that there is one.
    verdict
        Whether there is a backdoor, as far as can be told.
    false_alarm_rate
        Share of clean models like those of the calibration that would be flagged.
    p_value
        Share of such clean models that would have a larger score.
    target_class
        The class that it leads to, if there is one.
    suspects
        The 1 % of the neurons that most likely carry it, if there is one; first the likeliest.
    statistics
        What the score is made of, and the other candidates, by name.
    population
        What the calibration was fitted on. For models of another kind its rates may not hold.
    evidence
        What was measured.
    """

    score: float
    threshold: float
    verdict: bool
    false_alarm_rate: float
    p_value: float
    target_class: int
    suspects: list[SuspectNeuron]
    statistics: dict[str, float]
    population: dict[str, Any]
    evidence: Evidence

    def outcome(self) -> str:
        """The verdict in a sentence or two."""
        rate = f"{100 * self.false_alarm_rate:g} %"
        score = f"score {self.score:.2f}, threshold {self.threshold:.2f}"
        if not self.verdict:
            return f"No backdoor found ({score} for {rate} false alarms)."
        return (
            f"Backdoor likely, towards class {self.target_class} ({score} for {rate} false alarms)."
        )

    def content(self) -> dict[str, Any]:
        """All but the evidence as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "evidence"}


def detect(
    model: nn.Module,
    data: Any,
    config: DefenseConfig | None = None,
    *,
    calibration: str | os.PathLike[str] | Calibration = OWN,
    console: Console | None = None,
    group: ProcessGroup | None = None,
) -> Detection:
    """Tell whether a classifier has a backdoor, towards which class, and which neurons carry it.

    Parameters
    ----------
    model
        A plain classifier: images ``(N, *)`` to logits (N, classes). It is not changed.
    data
        The clean set, as in `mnp_fast.defend`. No trigger or poisoned image is needed.
    config
        Settings; those of the calibration if not given. Scores under others are not comparable.
    calibration
        What scores and thresholds are taken from; the package's own by default, which says in
        `population` what it was fitted on. Write one for models of your own with
        `python -m benchmarks.detection`.
    console
        Where progress is shown; nowhere if not given.
    group
        Processes that share the work, as in `mnp_fast.defend`.

    Returns
    -------
    Detection
        Score, verdict, suspect class and neurons.

    Raises
    ------
    TypeError, ValueError
        Bad input, as `mnp_fast.defend` says; a file that is no calibration.
    ConnectionError
        As in `mnp_fast.defend`.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    config = calibration.config() if config is None else config
    if not isinstance(config, DefenseConfig):
        raise TypeError(f"config must be a DefenseConfig, not {type(config).__name__}")
    clean = replace(clean_set(data), processes=Processes(group, config.shards))
    check_model(model, clean)
    shown = console if clean.processes.rank == 0 else None
    with progress_bars(shown) as progress:
        evidence = gather(model, clean, config, calibration.settings["runs"], progress)
    return judge(evidence, calibration)


def judge(evidence: Evidence, calibration: Calibration) -> Detection:
    """The verdict on a model whose evidence was gathered before."""
    score, threshold = calibration.score(evidence), calibration.threshold
    return Detection(
        score,
        threshold,
        score > threshold,
        calibration.false_alarm_rate,
        calibration.p_value(score),
        suspect_class(evidence.favours, evidence.offset_sizes),
        suspect_neurons(evidence),
        {name: function(evidence) for name, function in STATISTICS.items()},
        calibration.population,
        evidence,
    )


def suspect_neurons(evidence: Evidence) -> list[SuspectNeuron]:
    """The 1 % of the neurons with the highest scores in `Evidence.changes`, highest first."""
    neurons = [
        SuspectNeuron(name, index, z)
        for name, scores in evidence.changes.items()
        for index, z in enumerate(scores)
        if np.isfinite(z)
    ]
    neurons.sort(key=lambda neuron: -neuron.z)
    return neurons[: int(np.ceil(SUSPECTS * len(neurons)))]
