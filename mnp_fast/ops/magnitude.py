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


def _no_kernel(weights: Sequence[Tensor], norm: str) -> str | None:
    return "norm 'spectral' has no CUDA kernel" if norm == "spectral" else None


def _not_spectral(weights: Sequence[Tensor], norm: str) -> str | None:
    return None if norm == "spectral" else f"norm must be 'spectral', not {norm!r}"


def _by_linalg(weights: Sequence[Tensor], norm: str) -> list[Tensor]:
    return [_spectral(w) for w in weights]


def _spectral(weight: Tensor) -> Tensor:
    """Spectral norms of a layer, from the eigenvalues of its smaller Gram matrices, all at once."""
    if weight.dim() == 0 or not weight.is_floating_point():
        raise RuntimeError(
            "neuron_magnitude: weights must have shape (neurons, *) and a floating-point dtype, "
            f"not {tuple(weight.shape)} and {weight.dtype}"
        )
    if weight.numel() == 0:
        return weight.new_zeros(len(weight))
    few = weight.reshape(*weight.shape, *[1] * (3 - weight.dim()))
    rows = few.flatten(2).double()  # squares of float32 neither overflow nor round there
    infinite = ~rows.isfinite().all(2).all(1)
    rows = rows.masked_fill(infinite[:, None, None], 0)  # they would be an error
    gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
    largest = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()
    return largest.masked_fill(infinite, torch.nan).to(weight.dtype)


backends.register_compiled(
    "neuron_magnitude", torch.ops.mnp_fast.neuron_magnitude, _default, cuda_cannot=_no_kernel
)
# In front of plain torch, the last.
backends.register(
    "neuron_magnitude", backends.Candidate("linalg", None, _not_spectral, _by_linalg), position=-1
)
