"""Weights that stay as they are for a while are packed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ._extension import _C


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Keep a model's convolution weights packed while the block runs, instead of packing each call.

    The block promises not to change these weights: what is computed after a change may come from
    the old ones. Masks, norms and biases may change. What is kept counts against a limit as large
    as `memory_budget`; weights beyond it are packed in every call, as ever.

    Parameters
    ----------
    model
        A wrapped model; weights on other devices than the CPU are left alone.

    Raises
    ------
    RuntimeError
        At the end of the block: a weight was changed in it, or moved to other memory. Changes
        through `weight.data` go unnoticed.
    """
    weights = {
        name: (weight, weight.detach(), _version(weight))  # the alias keeps the memory
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
        and (weight := layer._parameters.get("weight")) is not None
        and weight.device.type == "cpu"
    }
    for _, memory, _ in weights.values():
        _C.freeze_weights(memory.data_ptr())
    try:
        yield
    finally:
        for _, memory, _ in weights.values():
            _C.thaw_weights(memory.data_ptr())
    for name, (weight, memory, version) in weights.items():
        if weight.data_ptr() != memory.data_ptr() or _version(weight) != version:
            raise RuntimeError(
                f"the weight of {name!r} was changed while it was frozen; what was computed since "
                "then may come from the old one"
            )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
