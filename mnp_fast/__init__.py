"""Fast magnitude-based neuron pruning: find and remove the neurons that carry a backdoor."""

from . import _extension, ops, reference  # _extension first: it registers the operators

__all__ = ["ops", "reference"]
