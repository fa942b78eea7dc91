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

VARIES = math.nan  # in place of a channel's constant
_ROUNDING = 1e-12  # of averages of equal numbers
# Every channel of the result is made of the same channel of the first argument, in all places
# by the same rule but for borders.
_PER_CHANNEL = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    nn.LogSigmoid,
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.neg),
    *("relu", "relu_", "sigmoid", "tanh", "clamp", "abs", "neg", "contiguous", "clone"),
}
_RESIZES = {nn.Upsample, F.interpolate}
# The same for images, by how many dimensions these have.
_POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
_PADS = ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad")
_FUNCTIONS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_PER_IMAGE: dict[Any, int] = {
    getattr(where, f"{name}{dims}d"): dims
    for where, names in ((nn, (*_POOLS, *_PADS)), (F, _FUNCTIONS))
    for name in names
    for dims in (1, 2, 3)
}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
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


class Followed(NamedTuple):
    """What is known of a node's result.

    Attributes
    ----------
    channels
        Its channels.
    shares
        Whether it is in the memory of what the node reads.
    overwrites
        Whether the node has changed what it reads.
    """

    channels: Channels
    shares: bool
    overwrites: bool = False


def follow(node: fx.Node, x: Channels, modules: dict[str, Any]) -> Followed | None:
    """The channels of what a node computes of one value.

    Parameters
    ----------
    node
        A node whose first argument is a value, and whose other arguments are none.
    x
        The channels of the first argument.
    modules
        Of the model, by name.

    Returns
    -------
    Followed or None
        None where the operation is not known.
    """
    kind, args = kind_of(node, modules), arguments(node)
    before, after = _shapes(node)
    view: Channels | None = None
    if kind in _VIEWS:
        view = _view(x, args, before, after)
    elif len(node.all_input_nodes) > 1:
        return None
    elif kind in _FLATTENS:
        module = modules[str(node.target)] if kind is nn.Flatten else None
        view = _flatten(x, before, *_flat_dims(node, module))
    elif kind in _PERMUTES and len(args) > 1:
        view = x._replace(dim=[dim % len(before) for dim in _listed(args)].index(x.dim))
    elif kind in _TRANSPOSES and len(args) == 3:
        order = list(range(len(before)))
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        view = x._replace(dim=order.index(x.dim))
    elif kind is operator.getitem:
        view = _unsqueeze(x, args[1])
    elif kind in _REDUCTIONS:
        dim = _reduced(x.dim, node)
        return None if dim is None else _run(node, x, dim, modules)
    elif (
        kind in _PER_CHANNEL
        or (kind in _PER_IMAGE and x.dim == len(before) - 1 - _PER_IMAGE[kind])
        or (kind in _RESIZES and x.dim == 1)
        or (kind in _DROPOUTS and node.kwargs.get("training") is False)
    ):
        return _run(node, x, x.dim, modules)
    return None if view is None else Followed(view, shares=True)


def is_per_channel(module: nn.Module) -> bool:
    """Whether a module makes every number of the number in its place alone."""
    return type(module) in _PER_CHANNEL


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node, of any type."""
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
    positional = dict(zip(("start_dim", "end_dim"), arguments(node)[1:], strict=False))
    given: dict[str, Any] = {"start_dim": 0, "end_dim": -1, **positional, **node.kwargs}
    return given["start_dim"], given["end_dim"]


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


def _reduced(counting: int, node: fx.Node) -> int | None:
    """The dimension that counts channels behind a mean, sum or maximum over others."""
    before, after = _shapes(node)
    args = arguments(node)
    dims: Any = args[1] if len(args) > 1 else node.kwargs.get("dim")
    if dims is None:
        return None
    reduced = {dim % len(before) for dim in ([dims] if isinstance(dims, int) else dims)}
    gone = sum(dim < counting for dim in reduced) if len(after) < len(before) else 0
    return None if counting in reduced else counting - gone


def _run(node: fx.Node, x: Channels, dim: int, modules: dict[str, Any]) -> Followed:
    """Do what the node does to an image of the constants; `dim` counts the result's channels."""
    args, kwargs, target = arguments(node)[1:], node.kwargs, node.target
    shape, _ = _shapes(node)
    image = x.constant.nan_to_num().reshape(-1, *(1,) * (len(shape) - x.dim - 1)).expand(shape)
    probe = image.clone(memory_format=torch.contiguous_format)
    if node.op == "call_module":
        y = modules[str(target)](probe)
    elif callable(target):
        y = target(probe, *args, **kwargs)
    else:
        y = getattr(probe, target)(*args, **kwargs)
    places = y.movedim(dim, 0).flatten(1)
    low, high = places.amin(1), places.amax(1)
    is_constant = ~x.constant.isnan() & (high - low <= _ROUNDING * high.abs())
    channels = Channels(dim, x.slots, torch.where(is_constant, low, VARIES))
    return Followed(channels, y.data_ptr() == probe.data_ptr(), not torch.equal(probe, image))
