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
        `"l1"` (the paper's magnitude), `"l2"`, `"linf"`, or `"spectral"`: the largest singular
        value of a neuron's weights ``(C, *)`` as a matrix with C rows.

    Returns
    -------
    list of Tensor
        One (K,) a layer; float32 for half types, else in the weight's dtype.

    Raises
    ------
    RuntimeError
        An unknown norm, or weights of another dtype or without dimensions.
    """
    rows = [w.detach() for w in weights]
    if norm == "spectral":  # computed from products of weights, which half types would overflow
        rows = [w.to(compute_dtype(w.dtype)) for w in rows]
    return backends.choose("neuron_magnitude", rows, norm).run(rows, norm)


@torch.library.register_fake("mnp_fast::neuron_magnitude")
def _fake(weights: list[Tensor], norm: str) -> list[Tensor]:
    return [w.new_empty(w.shape[0], dtype=compute_dtype(w.dtype)) for w in weights]


@default_kernel("neuron_magnitude")
def _default(weights: list[Tensor], norm: str) -> list[Tensor]:
    return reference.neuron_magnitude([w.to(compute_dtype(w.dtype)) for w in weights], norm)


backends.register_compiled("neuron_magnitude", torch.ops.mnp_fast.neuron_magnitude, _default)
