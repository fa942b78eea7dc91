"""Masked linear layer: ``act(mask * (scale * u + shift) + bias + residual)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from .._extension import _C
from ._common import autocast, in_transform, wants_grad
from .affine import compiled_affine, plain_affine
from .conv import compiled_conv2d

# From where the convolution's kernel is faster than torch's product: rows; or as many weights, if
# they are packed or there are several rows and as many multiply-adds.
FEWEST_ROWS, FEWEST_WEIGHTS, FEWEST_PRODUCTS = 1024, 2**18, 2**24
PARTS = 16  # of the rows; threads share them in the backward
_POINTWISE = ([1, 1], [0, 0], [1, 1], 1)  # stride, padding, dilation and groups


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

    On the CPU in float32, one kernel computes all of it where the weight takes no gradient and x
    has many rows, or the weight is large and frozen (`frozen_weights`) or meets several rows with
    much to multiply. Elsewhere the product is torch's and the rest one operator, `masked_affine`.

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
    if in_transform():
        return _plain(*arguments)
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


def _plain(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return _on_image(plain_affine, F.linear(x, weight), others)


def _compiled(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    if not kernel_wins(x, weight):
        return _on_image(compiled_affine, F.linear(x, weight), others)
    filters = _pixels(weight)

    def convolve(image: Tensor, *rest: Any) -> Tensor:
        return compiled_conv2d(image, filters, *rest[:-1], *_POINTWISE, rest[-1], "auto")

    return _on_image(convolve, x, others)


def _on_image(operator: Callable[..., Tensor], x: Tensor, others: tuple[Any, ...]) -> Tensor:
    """An operator on images, applied to (N, *, C)."""
    mask, *vectors, residual, activation = others
    per_sample = mask is not None and mask.dim() == 2
    added = None if residual is None else autocast(residual)
    if x.dim() == 2 and not wants_grad(x, mask, *vectors, residual):
        # Rows are images of one pixel; no gradient will be summed over an image.
        added = None if added is None else _pixels(added)
        return operator(_pixels(x), mask, *vectors, added, activation).flatten(1)
    added = None if added is None else as_image(added, per_sample)
    y = operator(as_image(x, per_sample), mask, *vectors, added, activation)
    return y.movedim(1, -1).reshape(*x.shape[:-1], y.shape[1])


def _pixels(rows: Tensor) -> Tensor:
    """(N, C) as images (N, C, 1, 1)."""
    return rows.reshape(*rows.shape, 1, 1)


def kernel_wins(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution's kernel is faster than torch's product.

    As measured on processors of two vendors, with AVX2 and with AVX-512.
    """
    if not x.is_cpu or not x.dtype == weight.dtype == torch.float32 or wants_grad(weight):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    rows = math.prod(x.shape[:-1])
    if rows >= FEWEST_ROWS and x.numel():
        return True
    has_memory = type(weight) in (Tensor, torch.nn.Parameter)  # subclasses may have none
    if not has_memory or weight.numel() < FEWEST_WEIGHTS:
        return False
    much = rows > 1 and rows * weight.numel() >= FEWEST_PRODUCTS
    return (much and _C.instruction_set != "baseline") or _C.weights_are_frozen(weight.data_ptr())


backends.register_compiled("masked_linear", _compiled, _plain)


def as_image(x: Tensor, per_sample: bool = True) -> Tensor:
    """(N, *, C) as a channels-last image (N, C, positions, 1), without copying.

    If not `per_sample`, the image's samples are parts of all rows where the sizes are known.
    """
    if x.dim() > 1 and (per_sample or torch.compiler.is_compiling()):  # sizes may be symbols there
        samples, positions = x.shape[0], math.prod(x.shape[1:-1])
    else:
        rows = math.prod(x.shape[:-1])
        samples = math.gcd(rows, PARTS)
        positions = rows // max(samples, 1)
    return x.reshape(samples, positions, 1, x.shape[-1]).movedim(-1, 1)
