"""Fused masked convolution: ``act(mask * (scale * u + shift) + bias + residual)``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends, reference
from ._common import (
    autocast,
    call,
    compute_dtype,
    default_kernel,
    empty_like_layout,
    in_transform,
    memory_format,
    no_double_backward,
    vector_grads,
    wants_grad,
)

ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")
NARROW = 12  # channels of a group below which "auto" does not take Winograd's (algorithm.cpp)


def allows(layer: torch.nn.Conv2d, algorithm: str) -> bool:
    """Whether an algorithm can compute a convolution, and is not far slower than the others."""
    if not algorithm.startswith("winograd"):
        return True
    computed = {(3, (1, 1)), (3, (2, 2))}  # kernel and stride
    if algorithm == "winograd4":
        computed.add((5, (1, 1)))
    size, other = layer.kernel_size
    channels = min(layer.in_channels, layer.out_channels) // layer.groups
    stride, is_wide = tuple(layer.stride), layer.groups == 1 or channels >= NARROW
    is_plain = stride == (1, 1) or tuple(layer.dilation) == (1, 1)
    return is_wide and is_plain and size == other and (size, stride) in computed


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    algorithm: str = "auto",
) -> Tensor:
    """Convolution, per-neuron affine, mask, residual and activation as one operator.

    Computes ``act(mask * (scale * conv2d(x, weight) + shift) + bias + residual)``. Differentiable
    in every tensor once; gradients that nobody asks for are not computed, the weight's above all.
    Under autocast, x, weight and residual are cast as by torch's convolution. Inside transforms of
    `torch.func` it is computed by torch's operators, and differentiable any number of times.

    Parameters
    ----------
    x
        Input (N, C, H, W); float32, float64, or bfloat16 and float16 (computed in float32). The
        output has its dtype and memory format (contiguous or channels-last).
    weight
        Filters (K, C / groups, kh, kw), in x's dtype.
    mask
        Neuron masks (K,), or one row a sample (N, K), whose gradient is then per sample too.
        None means 1. Where all samples have 0, the product of a neuron and its part of the
        gradients of x and weight may be left out: they count as 0, even if they are infinite or
        NaN. Where mask or scale take gradients, all neurons are computed in the forward.
    scale, shift, bias
        Per-neuron vectors (K,); None means 1, 0 and 0.
    residual
        Added before the activation; the output's shape.
    stride, padding, dilation
        One integer, or two for height and width. Padding is with zeros; what an infinite or NaN
        weight would make of them may be left out.
    groups
        Number of channel groups.
    activation
        `"none"` or `"relu"`.
    algorithm
        `"direct"`, or on the CPU `"winograd4"` (Winograd's F(4×4, 3×3), stride 1, or 2 with
        dilation 1, or F(2×2, 5×5), stride 1; several times faster, but not for groups of few
        channels) or `"winograd2"` (F(2×2, 3×3), the same strides, mostly slower than that and as
        exact as the direct one).
        Relative errors in float32 are below 1e-5 for `"winograd4"` and 1e-6 for the others; in
        Winograd's an infinity becomes a NaN and reaches the outputs of its tile, or of weight
        gradients the filter's nine taps of a channel. Gradients of input and weight are computed by
        it too, but that of the input with stride 2 and an even padding is direct, and so is that of
        a 5×5 weight, of one with groups, and with stride 2 by `"winograd2"`. `"auto"` chooses for
        each of them by the shape, for the output and the gradient of the weight also torch's own
        convolution where that is faster, and the direct one in float64.

    Returns
    -------
    Tensor
        (N, K, OH, OW).

    Raises
    ------
    RuntimeError
        Shapes, dtypes, devices or options that do not fit together; the message names the argument.
    """
    x, weight = autocast(x), autocast(weight)
    residual = None if residual is None else autocast(residual)
    tensors = (x, weight, mask, scale, shift, bias, residual)
    geometry = (pair(stride), pair(padding), pair(dilation), groups)
    arguments = (*tensors, *geometry, activation, algorithm)
    if in_transform():
        return _plain(*arguments)
    return backends.choose("masked_conv2d", *arguments).run(*arguments)


def compiled_conv2d(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """`masked_conv2d` by the compiled kernels, of arguments in their order, none left out."""
    *_, algorithm = others
    keep_u = wants_grad(*others[:2])  # mask and scale
    arguments = (x, weight, *others[:-1], keep_u, algorithm)
    return call(torch.ops.mnp_fast.masked_conv2d.default, *arguments)[0]


def _plain(x: Tensor, *others: Any) -> Tensor:
    return reference.masked_conv2d(x, *others[:-1]).to(x.dtype)


backends.register_compiled("masked_conv2d", compiled_conv2d, _plain)


def pair(value: int | Sequence[int]) -> list[int]:
    """Two integers, for height and width."""
    return [value, value] if isinstance(value, int) else list(value)


def output_size(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Shape of a convolution's output, from those of its input and its weight."""
    spatial = (
        (x[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return (x[0], weight[0], *spatial)


@torch.library.register_fake("mnp_fast::masked_conv2d")
def _fake(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    keep_u: bool,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    sizes = output_size(x.shape, weight.shape, stride, padding, dilation)
    dtype, layout = _form_of_u(x)
    if not keep_u:
        return empty_like_layout(x, sizes), x.new_empty(0, dtype=dtype)
    u = torch.empty(sizes, dtype=dtype, device=x.device, memory_format=layout)
    return empty_like_layout(x, sizes), u


def _form_of_u(x: Tensor) -> tuple[torch.dtype, torch.memory_format]:
    """What u is kept as: on the CPU as the kernels compute it, elsewhere as torch returns it."""
    if x.device.type == "cpu":
        return compute_dtype(x.dtype), torch.channels_last
    return x.dtype, memory_format(x)


@default_kernel("masked_conv2d")
def _default(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    keep_u: bool,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)  # of the weight too, so that torch's result has it
    u = F.conv2d(
        x, weight.contiguous(memory_format=layout), None, stride, padding, dilation, groups
    ).contiguous(memory_format=layout)
    y = torch.ops.mnp_fast.masked_affine(u, mask, scale, shift, bias, residual, activation)
    dtype, layout = _form_of_u(x)
    if not keep_u:
        return y, x.new_empty(0, dtype=dtype)
    return y, u.to(dtype).contiguous(memory_format=layout)


@torch.library.register_fake("mnp_fast::masked_conv2d_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_residual: bool,
    need_sums: bool,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=compute_dtype(x.dtype))
    return (
        empty_like_layout(x, tuple(x.shape)) if need_x else none,
        weight.new_empty(weight.shape) if need_weight else none.clone(),
        empty_like_layout(x, tuple(grad.shape)) if need_residual else none.clone(),
        none.new_empty(3, *grad.shape[:2]) if need_sums else none.clone(),
    )


@default_kernel("masked_conv2d_backward")
def _backward_default(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_residual: bool,
    need_sums: bool,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=compute_dtype(x.dtype))
    layout = memory_format(x)
    grad = grad.contiguous(memory_format=layout)
    # Without u, sums of products with it are 0: gradients of mask and scale are not wanted.
    known = grad if u is None else u.to(x.dtype).contiguous(memory_format=layout)
    g, dz, sums = torch.ops.mnp_fast.masked_affine_backward(
        grad, known, y, mask, scale, shift, need_x or need_weight, need_residual, need_sums
    )
    if need_sums and u is None:
        sums[1:] = 0
    dx = dw = none
    if need_x or need_weight:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            weight.contiguous(memory_format=layout),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [need_x, need_weight, False],
        )
    return (
        dx.contiguous(memory_format=layout) if need_x else none,
        dw.contiguous() if need_weight else none.clone(),
        dz if need_residual else none.clone(),
        sums if need_sums else none.clone(),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what `backward` needs; it hands the last input on as it is."""
    x, weight, mask, scale, shift, bias, _residual, *geometry, activation, keep_u = inputs[:-1]
    y, u = output
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)  # else a tensor of zeros as large as u is made each time
    ctx.geometry, ctx.algorithm = geometry, inputs[-1]
    ctx.relu, ctx.keep_u = activation == "relu", keep_u
    ctx.save_for_backward(
        x,
        weight,
        y if ctx.relu else None,
        u if keep_u else None,
        mask,
        scale,
        shift,
        bias,
    )


def backward(
    operator: str, ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of a forward operator's inputs, by the backward operator of the given name."""
    if grad is None:
        return (None,) * 14
    x, weight, y, u, mask, scale, shift, bias = ctx.saved_tensors
    need_x, need_weight, *need_vectors, need_residual = ctx.needs_input_grad[:7]
    if (need_vectors[0] or need_vectors[1]) and not ctx.keep_u:
        raise RuntimeError("masked_conv2d: gradients of mask and scale need keep_u=True")
    dx, dw, dz, sums = getattr(torch.ops.mnp_fast, operator)(
        grad,
        x,
        weight,
        y,
        u,
        mask,
        scale,
        shift,
        *ctx.geometry,
        need_x,
        need_weight,
        need_residual and ctx.relu,
        any(need_vectors),
        ctx.algorithm,
    )
    vectors: list[Tensor | None] = [None] * 4
    if any(need_vectors):
        vectors = vector_grads(sums, (mask, scale, shift, bias), tuple(need_vectors))
    residual = (dz if ctx.relu else grad) if need_residual else None
    return (
        dx if need_x else None,
        dw if need_weight else None,
        *vectors,
        residual,
        *(None,) * 7,
    )


torch.library.register_autograd(
    "mnp_fast::masked_conv2d",
    partial(backward, "masked_conv2d_backward"),
    setup_context=setup_context,
)
no_double_backward("masked_conv2d_backward")
