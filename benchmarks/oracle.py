"""Which neurons carry a backdoor, as one can tell who has the trigger: for evaluation only."""

from __future__ import annotations

import math

import numpy as np

from mnp_fast.stats.changes import change_scores
from mnp_fast.wrap import wrap

from .population import Subject

SHARE = 0.01  # of the neurons
IMAGES = 256  # held-back ones


def carriers(subject: Subject) -> dict[str, list[int]]:
    """By masked layer, the neurons among the 1 % of the model that the trigger changes most."""
    if subject.trigger is None:
        raise ValueError("subject must be a model under attack")
    images = subject.data.test[0][:IMAGES]
    scores = change_scores(wrap(subject.model).eval(), images, subject.trigger(images))
    known = np.concatenate(list(scores.values()))
    known = np.sort(known[np.isfinite(known)])
    least = known[-math.ceil(SHARE * len(known))]
    return {name: np.flatnonzero(values >= least).tolist() for name, values in scores.items()}
