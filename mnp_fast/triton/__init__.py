"""The fused operators as Triton kernels, for CUDA devices.

Importing this package does not import Triton; `mnp_fast.triton.conv` and `.linear` do.
"""

from .support import why_not_conv2d, why_not_linear

__all__ = ["why_not_conv2d", "why_not_linear"]
