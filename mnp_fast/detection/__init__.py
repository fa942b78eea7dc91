"""Whether a model has a backdoor: evidence, candidate statistics, calibration, verdict."""

from .calibration import Calibration
from .detect import Detection, SuspectNeuron, detect, judge
from .evidence import Evidence, gather
from .statistics import STATISTICS

__all__ = [
    "STATISTICS",
    "Calibration",
    "Detection",
    "Evidence",
    "SuspectNeuron",
    "detect",
    "gather",
    "judge",
]
