"""Per-neuron magnitude of many layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from ._common import compute_dtype, default_kernel


def neuron_magnitude(weights: Sequence[Tensor], norm: str = "l1") -> list[Tensor]:
    """Norm of every neuron's weights, for a list of layers. Not differentiable.

    Parameters
    ----------
    weights
        Tensors ``(K, *)`` with one row a neuron; float32, float64, bfloat16 or float16.
    norm
        `"l1"` (the paper's magnitude), `"l2"` or `"linf"`.

    Returns
    -------
    list of Tensor
        One (K,) a layer; float32 for half types, else in the weight's dtype.

    Raises
    ------
    RuntimeError
        An unknown norm, or weights of another dtype or without dimensions.
    """
    arguments = ([w.detach() for w in weights], norm)
    return backends.choose("neuron_magnitude", *arguments).run(*arguments)


@torch.library.register_fake("mnp_fast::neuron_magnitude")
def _fake(weights: list[Tensor], norm: str) -> list[Tensor]:
    return [w.new_empty(w.shape[0], dtype=compute_dtype(w.dtype)) for w in weights]


@default_kernel("neuron_magnitude")
def _default(weights: list[Tensor], norm: str) -> list[Tensor]:
    return reference.neuron_magnitude([w.to(compute_dtype(w.dtype)) for w in weights], norm)


backends.register_compiled("neuron_magnitude", torch.ops.mnp_fast.neuron_magnitude, _default)
