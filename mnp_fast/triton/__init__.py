"""The fused operators as Triton kernels, for CUDA devices: the candidates `triton` of `backends`.

Importing this package does not import Triton; `mnp_fast.triton.conv` and `.linear` do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import backends
from .support import missing, why_not_conv2d, why_not_linear

__all__ = ["why_not_conv2d", "why_not_linear"]


def _cannot_conv2d(x: Tensor, weight: Tensor, *others: Any) -> str | None:
    *_, groups, _, algorithm = others
    if algorithm not in ("auto", "direct"):
        return f"algorithm must be 'auto' or 'direct', not '{algorithm}'"
    return why_not_conv2d(x, weight, groups)


def _conv2d(*arguments: Any) -> Tensor:
    from .conv import masked_conv2d

    *tensors, stride, padding, dilation, groups, activation, _ = arguments
    return masked_conv2d(
        *tensors,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
    )


def _cannot_linear(x: Tensor, weight: Tensor, *others: Any) -> str | None:
    return why_not_linear(x, weight)


def _linear(*arguments: Any) -> Tensor:
    from .linear import masked_linear

    *tensors, activation = arguments
    return masked_linear(*tensors, activation=activation)


# In front of plain torch, the last.
for _operator, _cannot, _run in (
    ("masked_conv2d", _cannot_conv2d, _conv2d),
    ("masked_linear", _cannot_linear, _linear),
):
    _candidate = backends.Candidate("triton", missing(), _cannot, _run)
    backends.register(_operator, _candidate, position=-1)
