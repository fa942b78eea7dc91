"""Fused masked linear layer: a 1×1 convolution to the Triton kernels, one pixel a position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._common import autocast
from ..ops.linear import as_image, output_shape
from .conv import fused


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
    """`mnp_fast.ops.masked_linear` by the Triton kernels; arguments and result are the same.

    The product is in the same kernel as the rest. x must be float32, float16 or bfloat16 on a CUDA
    device. float32 is multiplied in float32, or in TF32 where torch lets its matrix products
    (`torch.backends.cuda.matmul`).

    Raises
    ------
    RuntimeError
        What the kernels cannot compute, or arguments that do not fit together; the message names
        the argument.
    """
    shape = output_shape(x, weight, residual)
    y = fused(
        (as_image(autocast(x)), autocast(weight)[:, :, None, None], mask, scale, shift, bias),
        None if residual is None else as_image(autocast(residual)),
        ([1, 1], [0, 0], [1, 1], 1),
        activation,
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )
    return y.movedim(1, -1).reshape(shape)
