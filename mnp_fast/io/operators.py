"""The operators an untrusted graph may use.

A list of what is allowed, not of what is forbidden: torch's namespaces also hold operators that
write files (`aten::save`, `aten::from_file`) or trust the sizes they are given.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch

_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")

ATEN = frozenset(
    """
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d
    add addmm alias amax amin arange argmax argmin asin asinh atan atan2 atanh avg_pool1d avg_pool2d
    baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm cat ceil celu channel_shuffle chunk
    clamp clamp_max clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d convolution copy cos cosh cumsum detach div dropout einsum elu eq
    erf exp expand expand_as expm1 fill feature_dropout flatten flip floor floor_divide fmod full
    full_like gather ge gelu glu group_norm gt hardshrink hardsigmoid hardswish hardtanh index
    index_select instance_norm isinf isnan layer_norm le leaky_relu lerp lift_fresh_copy linalg_norm
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logical_and
    logical_not logical_or logsumexp lt masked_fill matmul max max_pool1d max_pool2d
    max_pool2d_with_indices maximum mean meshgrid min minimum mish mm movedim mul narrow
    ne neg new_empty new_full new_ones
    new_zeros norm ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu prod
    reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder repeat repeat_interleave
    replication_pad1d replication_pad2d reshape rms_norm roll round rsqrt rsub scalar_tensor
    scaled_dot_product_attention select selu sigmoid sign silu sin sinh slice softmax softplus
    softshrink split split_with_sizes sqrt square squeeze stack std sub sum sym_numel sym_size t tan
    tanh threshold tile to transpose tril triu true_divide type_as unbind unflatten unsqueeze
    upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean view view_as where zero
    zeros zeros_like swapaxes swapdims _adaptive_avg_pool2d _log_softmax _softmax
    _to_copy _unsafe_view
    """.split()  # noqa: SIM905
)

# Checks that an exported graph carries along; they compute nothing.
IGNORED = frozenset(
    {
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)

_ARITHMETIC = "add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_"
SYMBOLIC: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name) for name in _ARITHMETIC.split()
}


def operator_name(target: str) -> str:
    """The bare name of an `aten` operator, without the `_` of its in-place form; else `target`."""
    match = _ATEN.fullmatch(target)
    if match is None:
        return target
    name = match[1]
    return name.removesuffix("_") if name.removesuffix("_") in ATEN else name


def resolve(target: str) -> Callable[..., Any] | None:
    """The function of an allowed operator, None for any other. Runs nothing.

    `target` is as in an archive: `"torch.ops.aten.conv2d.default"` or `"_operator.add"`.
    """
    if target in SYMBOLIC:
        return SYMBOLIC[target]
    match = _ATEN.fullmatch(target)
    if match is None or operator_name(target) not in ATEN:
        return None
    packet = getattr(torch.ops.aten, match[1], None)
    if packet is None or match[2] not in packet.overloads() or "out" in match[2]:
        return None
    overload: Callable[..., Any] = getattr(packet, match[2])
    return overload
