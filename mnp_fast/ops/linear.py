"""Masked linear layer: ``act(mask * (scale * u + shift) + bias + residual)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ._common import autocast
from .affine import masked_affine, plain_affine


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """``act(mask * (scale * (x @ weight.T) + shift) + bias + residual)``.

    The product is torch's, whose matrix products are hard to beat; the rest is one operator,
    `masked_affine`.

    Parameters
    ----------
    x
        Input ``(N, *, C)`` or (C,); dtypes, autocast and transforms as in `masked_conv2d`.
    weight
        (K, C), in x's dtype.
    mask, scale, shift, bias
        As in `masked_conv2d`.
    residual
        The output's shape.
    activation
        `"none"` or `"relu"`.

    Returns
    -------
    Tensor
        ``(N, *, K)`` or (K,).

    Raises
    ------
    RuntimeError
        As in `masked_conv2d`.
    """
    output_shape(x, weight, residual)
    arguments = (x, weight, mask, scale, shift, bias, residual, activation)
    return backends.choose("masked_linear", *arguments).run(*arguments)


def output_shape(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[int, ...]:
    """Shape of a linear layer's output, after a check of what is given."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            "masked_linear: x must have shape (N, *, C) and weight (K, C), "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape != shape:
        raise RuntimeError(
            f"masked_linear: residual must have the output's shape {shape}, "
            f"not {tuple(residual.shape)}"
        )
    return shape


def _product_and(
    affine: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    y = affine(
        as_image(F.linear(x, weight)),
        mask,
        scale,
        shift,
        bias,
        None if residual is None else as_image(autocast(residual)),
        activation=activation,
    )
    return y.movedim(1, -1).reshape(*x.shape[:-1], weight.shape[0])


backends.register_compiled(
    "masked_linear", partial(_product_and, masked_affine), partial(_product_and, plain_affine)
)


def as_image(x: Tensor) -> Tensor:
    """(N, *, C) as a channels-last image (N, C, positions, 1), without copying."""
    samples = x.shape[0] if x.dim() > 1 else 1
    positions = x.shape[1:-1].numel() if x.dim() > 1 else 1
    return x.reshape(samples, positions, 1, x.shape[-1]).movedim(-1, 1)
