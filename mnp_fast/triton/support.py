"""What the Triton kernels can compute. Known without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not_conv2d(x: Tensor, weight: Tensor, groups: int = 1) -> str | None:
    """Why the kernels cannot compute a masked convolution; None if they can.

    Parameters
    ----------
    x, weight
        The input and the filters; only device and dtype are looked at.
    groups
        Number of channel groups.
    """
    if groups != 1:
        return f"groups must be 1, not {groups}"
    return _why_not(x, weight)


def why_not_linear(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot compute a masked linear layer; None if they can.

    Parameters
    ----------
    x, weight
        The input and the weight; only device and dtype are looked at.
    """
    return _why_not(x, weight)


def missing() -> str | None:
    """Why the kernels cannot run in this installation at all; None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'mnp_fast[triton]')"
    return None


def _why_not(x: Tensor, weight: Tensor) -> str | None:
    if (why := missing()) is not None:
        return why
    device = x.device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"x must be on a CUDA device, not on {x.device}"
    if device == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU must have compute capability 8.0 or later"
    if weight.device != x.device:
        return f"x and weight must be on one device, not on {x.device} and {weight.device}"
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"dtype must be one of {names}, not {str(x.dtype).removeprefix('torch.')}"
    if weight.dtype != x.dtype:
        return f"x and weight must share a dtype, not {x.dtype} and {weight.dtype}"
    return None
