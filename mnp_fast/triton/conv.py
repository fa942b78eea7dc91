"""Fused masked convolution by the Triton kernels, differentiable and traceable.

Both operators have the schemas of `mnp_fast::masked_conv2d` and its backward, with `allow_tf32` in
the place of `algorithm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..ops._common import (
    autocast,
    compute_dtype,
    is_channels_last,
    no_double_backward,
    wants_grad,
)
from ..ops.conv import backward, output_size, pair, setup_context
from . import kernels
from .support import why_not_conv2d

_CHUNK, _ROWS, _COLUMNS = 128, 32, 64  # pixels, rows and neurons of a program of epilogue_backward


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
) -> Tensor:
    """`mnp_fast.ops.masked_conv2d` by the Triton kernels; arguments and result are the same.

    x must be float32, float16 or bfloat16 on a CUDA device, and groups 1. float32 is multiplied in
    float32, or in TF32 where torch lets its convolutions (`torch.backends.cudnn`).

    Raises
    ------
    RuntimeError
        What the kernels cannot compute, or arguments that do not fit together; the message names
        the argument.
    """
    return fused(
        (autocast(x), autocast(weight), mask, scale, shift, bias),
        None if residual is None else autocast(residual),
        (pair(stride), pair(padding), pair(dilation), groups),
        activation,
        allow_tf32(),
    )


def allow_tf32() -> bool:
    """Whether torch's settings let convolutions in float32 be multiplied in TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def fused(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    """Call the operator for x, weight, mask, scale, shift, bias; keep u where it is needed."""
    keep_u = wants_grad(tensors[2], tensors[3])
    return torch.ops.mnp_fast.triton_masked_conv2d(
        *tensors, residual, *geometry, activation, keep_u, allow_tf32
    )[0]


@triton_op("mnp_fast::triton_masked_conv2d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    keep_u: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    sizes = _check(x, weight, mask, (scale, shift, bias), stride, padding, dilation, groups)
    if activation not in ("none", "relu"):
        _fail(f"activation must be 'none' or 'relu', not {activation!r}")
    if residual is not None:
        _check_like("residual", residual, sizes, x.dtype, x.device)
    y = _empty(x, sizes, x.dtype, is_channels_last(x))
    u = _empty(x, sizes, torch.float32, True) if keep_u else _none(x)
    if y.numel() == 0:
        return y, u
    packed = _terms_last(weight)
    residual = None if residual is None else _flat(residual)
    kernel = kernels.CONV_FORWARD[_vectors(x, y, residual), x.element_size()]
    _launch(
        kernel,
        _tiles(y.numel() // sizes[1], sizes[1]),
        x,
        packed,
        y,
        u if keep_u else None,
        *(None if v is None else v.contiguous() for v in (mask, scale, shift, bias)),
        residual,
        *x.shape,
        *sizes[1:],
        *_strides(x),
        *_flat_strides(y),
        *_flat_strides(y if residual is None else residual),
        *stride,
        *padding,
        *dilation,
        KERNEL_HEIGHT=weight.shape[2],
        KERNEL_WIDTH=weight.shape[3],
        PER_SAMPLE=mask is not None and mask.dim() == 2,
        RELU=activation == "relu",
        PRECISION="tf32" if allow_tf32 else "ieee",
        WIDE=_wide(x, packed, y, u, residual),
    )
    return y, u


@triton_op("mnp_fast::triton_masked_conv2d_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_residual: bool,
    need_sums: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _check(x, weight, mask, (scale, shift), stride, padding, dilation, groups)
    _check_like("grad", grad, sizes, x.dtype, x.device)
    if y is not None:
        _check_like("y", y, sizes, x.dtype, x.device)
    if u is not None:
        _check_like("u", u, sizes, torch.float32, x.device)
    last = is_channels_last(x)
    identity = y is None and mask is None and scale is None  # then g is grad
    need_g = need_x or need_weight
    g = _empty(x, sizes, x.dtype, last) if need_g and not identity else None
    dz = _empty(x, sizes, x.dtype, last) if need_residual else None
    chunks = -(-sizes[2] * sizes[3] // _CHUNK)
    sums = _empty(x, (chunks, 3, *sizes[:2]), torch.float32, False) if need_sums else None
    if grad.numel():
        _epilogue_backward(grad, y, u, mask, scale, shift, g, dz, sums)
    g = grad if identity else g
    dx = _empty(x, x.shape, x.dtype, last) if need_x else _none(x)
    if g is not None and dx.numel():
        _grad_input(g, weight, dx, stride, padding, dilation, allow_tf32)
    dw = _none(x)
    if g is not None and need_weight:
        dw = torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
        )[1].contiguous()
    return (
        dx,
        dw,
        _none(x) if dz is None else dz,
        _none(x) if sums is None else sums.sum(0),
    )


def _epilogue_backward(
    grad: Tensor,
    y: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    g: Tensor | None,
    dz: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Write g, dz and the chunks' sums, as far as they are given."""
    written = g if g is not None else dz
    if written is None and sums is None:
        return
    grad, y, u = _flat(grad), None if y is None else _flat(y), None if u is None else _flat(u)
    batch, neurons, height, width = grad.shape
    grid = (batch * -(-height * width // _CHUNK), -(-neurons // _COLUMNS))
    _launch(
        kernels.epilogue_backward,
        grid,
        grad,
        y,
        u,
        *(None if v is None else v.contiguous() for v in (mask, scale, shift)),
        g,
        dz,
        sums,
        batch,
        neurons,
        height * width,
        *(stride for t in (grad, y, u, written) for stride in _flat_strides(t)),
        _mask_stride(mask),
        WIDE=_wide(grad, y, u, g, dz, sums),
        CHUNK=_CHUNK,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


def _grad_input(
    g: Tensor,
    weight: Tensor,
    dx: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    allow_tf32: bool,
) -> None:
    batch, channels, height, width = dx.shape
    packed = _terms_last(weight.transpose(0, 1))
    class_pixels = batch * -(-height // stride[0]) * -(-width // stride[1])
    grid = _tiles(class_pixels, channels, stride[0] * stride[1])
    _launch(
        kernels.CONV_GRAD_INPUT[_vectors(g, dx), g.element_size()],
        grid,
        g,
        packed,
        dx,
        *dx.shape,
        *g.shape[1:],
        *_strides(g),
        *_strides(dx),
        *stride,
        *padding,
        *dilation,
        *(s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)),
        KERNEL_HEIGHT=weight.shape[2],
        KERNEL_WIDTH=weight.shape[3],
        PRECISION="tf32" if allow_tf32 else "ieee",
        WIDE=_wide(g, packed, dx),
    )


def _launch(kernel: Any, grid: Any, first: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch on the device of the first argument: Triton takes the current one."""
    with torch.cuda.device_of(first):
        wrap_triton(kernel)[grid](first, *arguments, **options)


def _tiles(
    rows: int, columns: int, classes: int = 1
) -> Callable[[dict[str, int]], tuple[int, ...]]:
    """The grid: one program a tile, whose shape the autotuner chooses."""
    return lambda tile: (-(-rows // tile["ROWS"]) * -(-columns // tile["COLUMNS"]), classes)


def _empty(like: Tensor, sizes: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=dtype, device=like.device, memory_format=layout)


def _none(like: Tensor) -> Tensor:
    """What stands for an output that is not asked for."""
    return like.new_empty(0, dtype=compute_dtype(like.dtype))


def _terms_last(weight: Tensor) -> Tensor:
    """(columns, terms, kh, kw) as dense (columns, kh, kw, terms): what is summed over adjoins."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _flat(image: Tensor) -> Tensor:
    """The image, copied if one stride does not lead through its pixels row by row."""
    height, width = image.shape[2:]
    flat = height == 1 or width == 1 or image.stride(2) == image.stride(3) * width
    return image if flat else image.contiguous()


def _flat_strides(image: Tensor | None) -> tuple[int, ...]:
    """Strides of samples, neurons and pixels of what `_flat` returned."""
    if image is None:
        return (0, 0, 0)
    sample, neuron, row, column = _strides(image)
    return sample, neuron, column or row


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides, 0 where there is one element: torch may have any number there."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


def _vectors(*images: Tensor | None) -> bool:
    """Whether 16 bytes of neighbouring channels are at aligned addresses everywhere.

    Triton sees that in multiples of 16.
    """

    def aligned(image: Tensor) -> bool:
        sample, channel, *pixels = _strides(image)
        steps = (image.shape[1], sample, *pixels, image.storage_offset())
        return channel == 1 and all(step % 16 == 0 for step in steps)

    return all(aligned(image) for image in images if image is not None)


def _mask_stride(mask: Tensor | None) -> int:
    return mask.shape[1] if mask is not None and mask.dim() == 2 else 0


def _wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into any of the tensors, or numbers of pixels, need more than 32 bits."""
    limit = 2**31 - 2**16  # tiles reach past the end
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= limit
        for t in tensors
        if t is not None
    )


def _fail(message: str) -> NoReturn:
    raise RuntimeError(f"masked_conv2d (Triton): {message}")


def _check(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """Check what both directions are given; the output's shape."""
    reason = why_not_conv2d(x, weight, groups)
    if reason is not None:
        _fail(reason)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        given = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        _fail(f"x must have shape (N, C, H, W) and weight (K, C, kh, kw), not {given}")
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != 2 or min(values) < least:
            _fail(f"{name} must be two integers of at least {least}, not {tuple(values)}")
    if stride[0] * stride[1] > 65535:
        _fail(f"stride must have a product of at most 65535, not {tuple(stride)}")
    sizes = output_size(x.shape, weight.shape, stride, padding, dilation)
    if min(weight.shape[2:]) < 1 or min(sizes[2:]) < 1:
        _fail(
            f"weight of shape {tuple(weight.shape)} does not fit into x of shape {tuple(x.shape)}"
        )
    named = zip(("mask", "scale", "shift", "bias"), (mask, *vectors), strict=False)
    for name, vector in named:
        if vector is None:
            continue
        shapes = [sizes[1:2], sizes[:2]] if name == "mask" else [sizes[1:2]]
        if tuple(vector.shape) not in shapes:
            allowed = " or ".join(map(str, shapes))
            _fail(f"{name} must have shape {allowed}, not {tuple(vector.shape)}")
        if vector.device != x.device or not vector.is_floating_point():
            _fail(f"{name} must be floating-point and on {x.device}")
    return sizes


def _check_like(
    name: str, t: Tensor, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(t.shape) != sizes or t.dtype != dtype or t.device != device:
        _fail(
            f"{name} must have shape {sizes}, {dtype} and be on {device}, "
            f"not {tuple(t.shape)}, {t.dtype} on {t.device}"
        )


torch.library.register_autograd(
    "mnp_fast::triton_masked_conv2d",
    partial(backward, "triton_masked_conv2d_backward"),
    setup_context=setup_context,
)
no_double_backward("triton_masked_conv2d_backward")
