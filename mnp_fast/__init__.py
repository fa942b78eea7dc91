"""Fast magnitude-based neuron pruning: find and remove the neurons that carry a backdoor."""

from . import _extension as _extension  # first: it registers the operators
from . import backends, ops, reference
from . import triton as triton  # its kernels are candidates of `backends`
from .compact import compact
from .config import DefenseConfig
from .defend import defend
from .detection import Detection, detect
from .frozen import frozen_weights
from .info import build_info
from .memory import memory_budget, set_memory_budget
from .result import DefenseResult
from .stats import NeuronStats, neuron_stats
from .wrap import masks, unwrap, wrap

__all__ = [
    "DefenseConfig",
    "DefenseResult",
    "Detection",
    "NeuronStats",
    "backends",
    "build_info",
    "compact",
    "defend",
    "detect",
    "frozen_weights",
    "masks",
    "memory_budget",
    "neuron_stats",
    "ops",
    "reference",
    "set_memory_budget",
    "unwrap",
    "wrap",
]
