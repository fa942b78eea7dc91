"""Fast magnitude-based neuron pruning: find and remove the neurons that carry a backdoor."""

from . import _extension, ops, reference  # _extension first: it registers the operators
from .wrap import masks, unwrap, wrap

__all__ = ["masks", "ops", "reference", "unwrap", "wrap"]
