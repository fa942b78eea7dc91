"""Masked per-neuron affine map, for norm layers with no convolution in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ._common import (
    call,
    compute_dtype,
    default_kernel,
    in_transform,
    is_channels_last,
    no_double_backward,
    vector_grads,
)


def masked_affine(
    x: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """``act(mask * (scale * x + shift) + bias + residual)``, differentiable once in every tensor.

    Inside transforms of `torch.func` as `masked_conv2d`.

    Parameters
    ----------
    x
        Input ``(N, K, *)``; float32, float64, or bfloat16 and float16 (computed in float32).
    mask
        Neuron masks (K,), or one row a sample (N, K), whose gradient is then per sample too.
        None means 1.
    scale, shift, bias
        Per-neuron vectors (K,); None means 1, 0 and 0.
    residual
        Added before the activation; x's shape.
    activation
        `"none"` or `"relu"`.

    Returns
    -------
    Tensor
        x's shape, dtype and memory format (contiguous or channels-last).

    Raises
    ------
    RuntimeError
        Shapes, dtypes, devices or options that do not fit together; the message names the argument.
    """
    arguments = (x, mask, scale, shift, bias, residual, activation)
    if in_transform():
        return plain_affine(*arguments)
    return backends.choose("masked_affine", *arguments).run(*arguments)


def plain_affine(
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`masked_affine` by torch's operators alone."""
    y = reference.masked_affine(x, mask, scale, shift, bias, residual, activation)
    return y.to(x.dtype)


def compiled_affine(*arguments: Any) -> Tensor:
    """`masked_affine` by the compiled kernels, of arguments in their order, none left out."""
    y: Tensor = call(torch.ops.mnp_fast.masked_affine.default, *arguments)
    return y


backends.register_compiled("masked_affine", compiled_affine, plain_affine)


def _dense(x: Tensor) -> Tensor:
    """An empty tensor like x, channels-last or contiguous."""
    if not is_channels_last(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


@torch.library.register_fake("mnp_fast::masked_affine")
def _fake(
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return _dense(x)


@default_kernel("masked_affine")
def _default(
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    y = reference.masked_affine(x, mask, scale, shift, bias, residual, activation)
    return _dense(x).copy_(y)


@torch.library.register_fake("mnp_fast::masked_affine_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    need_x: bool,
    need_residual: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _dense(x) if need_x else x.new_empty(0),
        _dense(x) if need_residual else x.new_empty(0),
        x.new_empty((3, *x.shape[:2]) if need_sums else 0, dtype=compute_dtype(x.dtype)),
    )


@default_kernel("masked_affine_backward")
def _backward_default(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    need_x: bool,
    need_residual: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    vectors = (None if v is None else v.to(dtype) for v in (mask, scale, shift))
    dz, g, sums = reference.epilogue_backward(grad.to(dtype), y, x.to(dtype), *vectors)
    return (
        _dense(x).copy_(g) if need_x else x.new_empty(0),
        _dense(x).copy_(dz) if need_residual else x.new_empty(0),
        sums if need_sums else sums.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, scale, shift, bias, _, activation = inputs
    ctx.relu = activation == "relu"
    ctx.save_for_backward(x, output if ctx.relu else None, mask, scale, shift, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, mask, scale, shift, bias = ctx.saved_tensors
    need_x, *need_vectors, need_residual = ctx.needs_input_grad[:6]
    dx, dz, sums = torch.ops.mnp_fast.masked_affine_backward(
        grad, x, y, mask, scale, shift, need_x, need_residual and ctx.relu, any(need_vectors)
    )
    vectors: list[Tensor | None] = [None] * 4
    if any(need_vectors):
        vectors = vector_grads(sums, (mask, scale, shift, bias), tuple(need_vectors))
    residual = (dz if ctx.relu else grad) if need_residual else None
    return dx if need_x else None, *vectors, residual, None


torch.library.register_autograd("mnp_fast::masked_affine", _backward, setup_context=_setup_context)
no_double_backward("masked_affine_backward")
