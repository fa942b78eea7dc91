"""What one operation on one value makes of its channels, each by itself.

Constants are not computed by rules for every operation: the operation is run on an image that holds
the constants, and what is one number in all places afterwards is a constant again.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .dataflow import kind_of

VARIES = math.nan

_ROUNDING = 1e-12  # of averages of equal numbers
# Every channel of the result is made of the same channel of the first argument, in all places
# by the same rule but for borders.
_PER_CHANNEL = {
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU),
    *(nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid),
    *(nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.neg),
    *("relu", "relu_", "sigmoid", "tanh", "clamp", "abs", "neg", "contiguous", "clone"),
}
_PER_IMAGE = {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
}
_DROPOUTS = {F.dropout, F.dropout2d}
_FLATTENS = {nn.Flatten, torch.flatten, "flatten"}
_VIEWS = {torch.reshape, "reshape", "view"}
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
_PERMUTES = {torch.permute, "permute"}
_TRANSPOSES = {torch.transpose, "transpose"}


class Channels(NamedTuple):
    """The channels of a value.

    Attributes
    ----------
    dim
        The dimension that counts them.
    slots
        (channels,) int64: one number a channel; those of equal numbers are removed together.
    constant
        (channels,) float64: the number that a channel holds everywhere, NaN where it varies.
    """

    dim: int
    slots: Tensor
    constant: Tensor


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a tensor on the example inputs; None for what is no tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def follow(
    node: fx.Node, values: dict[fx.Node, Channels], modules: dict[str, Any]
) -> Channels | None:
    """The channels of what a node computes of one value.

    Parameters
    ----------
    node
        A node whose first argument is a value, and whose other arguments are none.
    values
        The channels of the first argument; new ones are put there if the node works in place.
    modules
        Of the model, by name.

    Returns
    -------
    Channels or None
        None where the operation is not known.
    """
    kind, args = kind_of(node, modules), arguments(node)
    x = values[args[0]]
    before, after = _shapes(node)
    if kind in _FLATTENS:
        module = modules[str(node.target)] if kind is nn.Flatten else None
        return _flatten(x, before, *_flat_dims(node, module))
    if kind in _VIEWS:
        return _view(x, args, before, after)
    if kind in _PERMUTES:
        dims = _listed(args)
        return x._replace(dim=[dim % len(before) for dim in dims].index(x.dim)) if dims else None
    if kind in _TRANSPOSES:
        order = list(range(len(before)))
        a, b = args[1:]
        order[a], order[b] = order[b], order[a]
        return x._replace(dim=order.index(x.dim))
    if kind is operator.getitem:
        return _unsqueeze(x, args[1])
    if kind in _REDUCTIONS:
        dims = args[1] if len(args) > 1 else node.kwargs.get("dim")
        return None if dims is None else _reduce(node, values, dims, modules)
    if (
        kind in _PER_CHANNEL
        or (kind in _PER_IMAGE and x.dim == len(before) - 3)
        or (kind in _DROPOUTS and node.kwargs.get("training") is False)
    ):
        return _run(node, values, x.dim, modules)
    return None


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node."""
    return node.args


def _shapes(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the first argument, and of the result."""
    before, after = shape_of(arguments(node)[0]), shape_of(node)
    assert before is not None
    assert after is not None
    return before, after


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes or dimensions behind the first argument, be they one argument or several."""
    rest = args[1:]
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


def _flat_dims(node: fx.Node, module: nn.Flatten | None) -> tuple[int, int]:
    """First and last of the dimensions that become one."""
    if module is not None:
        return module.start_dim, module.end_dim
    given: dict[str, Any] = dict(zip(("start", "end"), arguments(node)[1:], strict=False))
    return (
        given.get("start", node.kwargs.get("start_dim", 0)),
        given.get("end", node.kwargs.get("end_dim", -1)),
    )


def _flatten(x: Channels, shape: tuple[int, ...], start: int, end: int) -> Channels:
    start, end = start % len(shape), end % len(shape)
    if x.dim < start:
        return x
    if x.dim > end:
        return x._replace(dim=x.dim - (end - start))
    outer, inner = math.prod(shape[start : x.dim]), math.prod(shape[x.dim + 1 : end + 1])

    def spread(of_channel: Tensor) -> Tensor:
        return of_channel[None, :, None].expand(outer, -1, inner).reshape(-1)

    return Channels(start, spread(x.slots), spread(x.constant))


def _view(
    x: Channels, args: tuple[Any, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> Channels | None:
    """Only a flatten, whose size is not written down."""
    start = len(after) - 1
    if _listed(args)[-1:] != (-1,) or before[:start] != after[:start] or x.dim < start:
        return None
    return _flatten(x, before, start, -1)


def _unsqueeze(x: Channels, index: Any) -> Channels | None:
    """``x[:, :, None, None]``: nothing but whole and new dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    whole = [position for position, part in enumerate(parts) if part == slice(None)]
    new = sum(part is None for part in parts)
    if len(whole) + new < len(parts) or len(whole) <= x.dim:
        return None
    return x._replace(dim=whole[x.dim])


def _reduce(
    node: fx.Node, values: dict[fx.Node, Channels], dims: Any, modules: dict[str, Any]
) -> Channels | None:
    """A mean, sum or maximum over other dimensions than the channels'."""
    x, (before, after) = values[arguments(node)[0]], _shapes(node)
    reduced = {dim % len(before) for dim in ([dims] if isinstance(dims, int) else dims)}
    if x.dim in reduced:
        return None
    gone = sum(dim < x.dim for dim in reduced) if len(after) < len(before) else 0
    return _run(node, values, x.dim - gone, modules)


def _run(
    node: fx.Node, values: dict[fx.Node, Channels], dim: int, modules: dict[str, Any]
) -> Channels:
    """Do what the node does to an image of the constants; `dim` counts the result's channels."""
    (source, *args), kwargs, target = arguments(node), node.kwargs, node.target
    x, (shape, _) = values[source], _shapes(node)
    known = x.constant.nan_to_num()
    probe = known.reshape(-1, *(1,) * (len(shape) - x.dim - 1)).expand(shape).contiguous()
    if node.op == "call_module":
        y = modules[str(target)](probe)
    elif callable(target):
        y = target(probe, *args, **kwargs)
    else:
        y = getattr(probe, target)(*args, **kwargs)
    places = y.movedim(dim, 0).flatten(1)
    low, high = places.amin(1), places.amax(1)
    is_constant = ~x.constant.isnan() & (high - low <= _ROUNDING * high.abs())
    result = Channels(dim, x.slots, torch.where(is_constant, low, VARIES))
    if y.data_ptr() == probe.data_ptr():
        values[source] = result
    return result
