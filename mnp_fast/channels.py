"""What becomes of every channel of a model: where it is constant, and with which others it goes.

The model's graph is interpreted once on abstract values. Of every value it is known which dimension
counts its channels, which of them hold one number in all places whatever the input is, and which
channels of other values have the same fate: they can be removed together, or not at all. What is
not understood is pinned: its channels stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .dataflow import Tracer, kind_of
from .layers import is_norm_act
from .per_channel import VARIES, Channels, arguments, follow, is_per_channel, shape_of

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_CHUNKS = {torch.chunk, "chunk"}
_ARITHMETIC: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), torch.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), torch.sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), torch.mul),
    **dict.fromkeys((operator.truediv, torch.div, "div", "div_"), torch.div),
}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, "add_", "sub_", "mul_", "div_"}


class Fates:
    """Sets of channels that are removed together, some of them pinned.

    Every channel is in one set; a set is known by the slot of one of its channels, its root.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._pinned: list[int] = []

    def new(self, count: int) -> Tensor:
        """Slots of channels that share no fate yet."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def _root(self, slot: int) -> int:
        while self._parents[slot] != slot:
            self._parents[slot] = slot = self._parents[self._parents[slot]]
        return slot

    def join(self, first: Tensor, second: Tensor) -> None:
        """Channel by channel, both share one fate."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._root(a)] = self._root(b)

    def pin(self, slots: Tensor) -> None:
        """These channels stay."""
        self._pinned.extend(slots.tolist())

    def roots(self) -> Tensor:
        """The set of every slot."""
        slots = range(len(self._parents))
        return torch.tensor([self._root(slot) for slot in slots], dtype=torch.int64)

    def pinned(self) -> Tensor:
        """Whether a set stays, one bool a root; those of other slots mean nothing."""
        result = torch.zeros(len(self._parents), dtype=torch.bool)
        result[[self._root(slot) for slot in self._pinned]] = True
        return result


@dataclass
class Layer:
    """A convolution or linear layer that is called once.

    Attributes
    ----------
    module
        The layer.
    uses
        (groups, neurons of a group, channels of a group) whether a neuron has a weight other than
        0 for a channel.
    inputs
        (groups, channels of a group) sets of the channels that it reads.
    constant
        (groups, channels of a group) float64: their constants, NaN where they vary.
    outputs
        (groups, neurons of a group) sets of its neurons.
    has_border
        Whether it makes of a constant what is none, at a border of zeros or as a transposed one.
    """

    module: _ConvNd | nn.Linear
    uses: Tensor
    inputs: Tensor
    constant: Tensor
    outputs: Tensor
    has_border: bool


def grouped_weight(module: _ConvNd | nn.Linear) -> Tensor:
    """(groups, neurons of a group, channels of a group, positions of the kernel) float64, CPU."""
    weight = module.weight.detach().to("cpu", torch.float64, copy=True)
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return weight.transpose(1, 2) if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer's weight has its channels first, and then its neurons."""
    return isinstance(module, _ConvTransposeNd)


@dataclass
class ChannelFlow:
    """The channels of a model.

    Attributes
    ----------
    layers
        In the order of their calls.
    norms
        Batch norms, and the sets of their channels (channels,).
    kept
        Whether a set stays whatever is pruned, one bool a set.
    """

    layers: list[Layer]
    norms: list[tuple[Norm, Tensor]]
    kept: Tensor


def channel_flow(model: nn.Module, example_inputs: tuple[Any, ...]) -> ChannelFlow:
    """Follow the channels of a model in eval mode, on inputs of the given shapes.

    Raises
    ------
    ValueError
        The model cannot be traced symbolically.
    """
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced symbolically, so its channels cannot be "
            f"followed: {error}"
        ) from error
    with torch.no_grad():
        ShapeProp(fx.GraphModule(model, graph)).propagate(*example_inputs)
    follower = _Follower(model, graph)
    for node in graph.nodes:
        follower.visit(node)
    roots = follower.fates.roots()
    for layer in follower.layers:
        layer.inputs, layer.outputs = roots[layer.inputs], roots[layer.outputs]
    norms = [(norm, roots[slots]) for norm, slots in follower.norms]
    return ChannelFlow(follower.layers, norms, follower.fates.pinned())


class _Follower:
    """Interprets a graph node by node."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.fates = Fates()
        self.values: dict[fx.Node, Channels] = {}
        self.names: dict[fx.Node, set[fx.Node]] = {}
        self.chunks: dict[fx.Node, list[Channels]] = {}
        self.layers: list[Layer] = []
        self.norms: list[tuple[Norm, Tensor]] = []
        self.uses: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op == "call_module":
                self.uses[str(node.target)] += 1
            elif node.op == "get_attr":
                self.uses[str(node.target).rpartition(".")[0]] += 1

    def visit(self, node: fx.Node) -> None:
        """Find the channels of what a node computes; give up those it reads if that is unknown."""
        if self._reads_other_facts(node) or self._chunk(node):
            return
        shape = shape_of(node)
        known = None if shape is None else self._follow(node, shape)
        if known is not None:
            self.values[node] = known
        else:
            for source in node.all_input_nodes:
                self._give_up(source)

    def _follow(self, node: fx.Node, shape: tuple[int, ...]) -> Channels | None:
        args, kind = arguments(node), kind_of(node, self.modules)
        if not args or self._has_hooks(node):
            return None
        if kind in CONVS:
            kernel = self.modules[str(node.target)].kernel_size
            return self._layer(node, len(shape) - 1 - len(kernel))
        if kind is nn.Linear:
            return self._layer(node, len(shape) - 1)
        if kind in NORMS or is_norm_act(kind):
            return self._norm(node)
        if kind in _ARITHMETIC:
            return self._arithmetic(node, kind, len(shape))
        if kind is torch.cat:
            return self._cat(node, len(shape))
        if kind is operator.getitem and args[0] in self.values:
            sliced = self._slice(self.values[args[0]], args[1])
            if sliced is not None:
                self._share(node, args[0])
                return sliced
        tensors = [source for source in node.all_input_nodes if shape_of(source) is not None]
        if tensors != [args[0]] or args[0] not in self.values:
            return None
        found = follow(node, self.values[args[0]], self.modules)
        if found is None:
            return None
        if found.overwrites:
            self._overwrite(args[0])
        if found.shares:
            self._share(node, args[0])
        return found.channels

    def _has_hooks(self, node: fx.Node) -> bool:
        """Whether a module does more than its class says, such as another weight at every call."""
        if node.op != "call_module":
            return False
        module = self.modules[str(node.target)]
        return bool(module._forward_pre_hooks or module._forward_hooks)

    def _give_up(self, source: fx.Node) -> None:
        """The channels of a value stay, and may have been changed in place."""
        value = self.values.pop(source, None)
        for part in self.chunks.get(source, []) if value is None else [value]:
            self._overwrite(source)
            self.fates.pin(part.slots)

    def _share(self, node: fx.Node, source: fx.Node) -> None:
        """Both are names of the same memory."""
        names = self.names.setdefault(source, {source})
        names.add(node)
        self.names[node] = names

    def _overwrite(self, source: fx.Node) -> None:
        """Nothing is constant any more of what shares memory with a value."""
        for name in self.names.get(source, {source}):
            if name in self.values:
                self.values[name] = _varying(self.values[name])
            if name in self.chunks:
                self.chunks[name] = [_varying(part) for part in self.chunks[name]]

    def _pinned(self, dim: int, count: int) -> Channels:
        """Channels that vary and stay."""
        slots = self.fates.new(count)
        self.fates.pin(slots)
        return Channels(dim, slots, torch.full((count,), VARIES, dtype=torch.float64))

    def _read(self, source: fx.Node, dim: int) -> Channels:
        """What somebody reads who expects channels at `dim`."""
        x, shape = self.values.get(source), shape_of(source)
        assert shape is not None
        if x is not None and x.dim == dim:
            return x
        self._give_up(source)
        return self._pinned(dim, shape[dim])

    def _reads_other_facts(self, node: fx.Node) -> bool:
        """Whether a node reads only facts that removing channels does not change."""
        args = arguments(node)
        if node.op == "call_method" and node.target in ("dim", "size"):
            fact, indices = node.target, args[1:]
        elif node.target is getattr:
            fact, indices = args[1], ()
        else:
            return False
        source, shape = args[0], shape_of(args[0])
        if fact not in ("size", "shape") or source not in self.values or shape is None:
            return fact in ("dim", "size", "ndim", "shape", "dtype", "device")
        if not indices:
            readers = [user for user in node.users if user.target is operator.getitem]
            if len(readers) < len(node.users):
                return False
            indices = tuple(arguments(user)[1] for user in readers)
        if not all(isinstance(index, (int, slice)) for index in indices):
            return False
        dims = list(range(len(shape)))
        read = [dims[index] if isinstance(index, slice) else [dims[index]] for index in indices]
        return not any(self.values[source].dim in some for some in read)

    def _chunk(self, node: fx.Node) -> bool:
        """Whether a node cuts a value into equal parts, or takes one of them."""
        args, kind = arguments(node), kind_of(node, self.modules)
        if kind is operator.getitem and args[0] in self.chunks:
            self.values[node] = self.chunks[args[0]][args[1]]
            self._share(node, args[0])
            return True
        x = self.values.get(args[0]) if kind in _CHUNKS else None
        positional = dict(zip(("chunks", "dim"), args[1:], strict=False))
        given: dict[str, Any] = {"dim": 0, **positional, **node.kwargs}
        if x is None or not all(isinstance(value, int) for value in given.values()):
            return False
        shape = shape_of(args[0]) or ()
        count, dim = given["chunks"], given["dim"] % len(shape)
        parts = [x] * count
        if dim == x.dim:
            if shape[dim] % count:
                return False
            sides = (side.split(shape[dim] // count) for side in (x.slots, x.constant))
            parts = [Channels(dim, *side) for side in zip(*sides, strict=True)]
            for part in parts[1:]:  # they stay equally long
                self.fates.join(part.slots, parts[0].slots)
        self.chunks[node] = parts
        self._share(node, args[0])
        return True

    def _slice(self, x: Channels, index: Any) -> Channels | None:
        """``x[:, a:b]``: what is in front of its ends stays, so that they mean the same."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in parts):
            return None
        part = parts[x.dim] if x.dim < len(parts) else slice(None)
        start, stop = part.start or 0, part.stop
        if part.step not in (None, 1) or any(
            not isinstance(end, int) or end < 0 for end in (start, stop or 0)
        ):
            return None
        if start == 0 and stop is None:
            return x
        self.fates.pin(x.slots[: start + 1 if stop is None else stop])  # one of the rest, too
        return x._replace(slots=x.slots[part], constant=x.constant[part])

    def _layer(self, node: fx.Node, dim: int) -> Channels:
        module = self.modules[str(node.target)]
        x, weight = self._read(arguments(node)[0], dim), grouped_weight(module)
        neurons = self.fates.new(weight.shape[0] * weight.shape[1])
        layer = Layer(
            module,
            (weight != 0).any(3),
            x.slots.reshape(len(weight), -1),
            x.constant.reshape(len(weight), -1),
            neurons.reshape(len(weight), -1),
            is_transposed(module) or (isinstance(module, CONVS) and _pads_with_zeros(module)),
        )
        if self.uses[str(node.target)] > 1:
            # Another call would have to lose the same channels, with the same constants.
            self.fates.pin(x.slots)
            self.fates.pin(neurons)
        else:
            self.layers.append(layer)
        return Channels(dim, neurons, _constant_neurons(layer, weight))

    def _norm(self, node: fx.Node) -> Channels | None:
        norm = self.modules[str(node.target)]
        behind = [norm.drop, norm.act] if is_norm_act(type(norm)) else []
        if not all(map(is_per_channel, behind)):
            return None
        x = self._read(arguments(node)[0], 1)
        if self.uses[str(node.target)] > 1:
            self.fates.pin(x.slots)
        else:
            self.norms.append((norm, x.slots))
        constant = _constant_norm(norm, x.constant)
        for function in behind:
            constant = torch.where(constant.isnan(), VARIES, function(constant.nan_to_num()))
        return x._replace(constant=constant)

    def _arithmetic(self, node: fx.Node, kind: Any, rank: int) -> Channels | None:
        """An operation on two values, or on a value and a number."""
        args = arguments(node)
        values = [self.values[part] for part in args if part in self.values]
        numbers = [part for part in args if isinstance(part, (int, float))]
        if len(args) != 2 or len(values) + len(numbers) != 2 or not values or node.kwargs:
            return None
        ranks = {len(shape_of(part) or ()) for part in args if part in self.values}
        if len({value.dim for value in values}) > 1 or ranks != {rank}:
            return None
        widest = max(values, key=lambda value: len(value.slots))
        for value in values:
            if len(value.slots) == len(widest.slots):
                self.fates.join(value.slots, widest.slots)
            else:
                self.fates.pin(value.slots)  # one channel for all of the other's
        a, b = (
            self.values[part].constant if part in self.values else torch.tensor(part).double()
            for part in args
        )
        constant = _ARITHMETIC[kind](a, b)
        if _ARITHMETIC[kind] is torch.mul:
            constant[(a == 0) | (b == 0)] = 0
        result = widest._replace(constant=constant)
        if kind in _IN_PLACE:
            self._overwrite(args[0])
            self._share(node, args[0])
        return result

    def _cat(self, node: fx.Node, rank: int) -> Channels | None:
        """Values one after the other along their channels."""
        args = arguments(node)
        dim: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(args[0], (tuple, list)):
            return None
        known = [self.values.get(part) for part in args[0]]
        if any(value is not None and value.dim != dim % rank for value in known):
            return None
        parts = [self._read(part, dim % rank) for part in args[0]]
        return Channels(
            dim % rank,
            torch.cat([part.slots for part in parts]),
            torch.cat([part.constant for part in parts]),
        )


def _varying(value: Channels) -> Channels:
    return value._replace(constant=torch.full_like(value.constant, VARIES))


def _pads_with_zeros(conv: _ConvNd) -> bool:
    named = isinstance(conv.padding, str)
    padding = conv._reversed_padding_repeated_twice if named else conv.padding
    return conv.padding_mode == "zeros" and any(padding)


def _constant_neurons(layer: Layer, weight: Tensor) -> Tensor:
    """(neurons,) what a layer makes of constants, NaN where a neuron uses what varies."""
    varies = layer.constant.isnan() | (layer.has_border & (layer.constant != 0))
    result = torch.einsum("goik,gi->go", weight, layer.constant.nan_to_num())
    result[(layer.uses & varies[:, None]).any(2)] = VARIES
    bias = layer.module.bias
    return result.flatten() if bias is None else result.flatten() + bias.detach().double().cpu()


def _constant_norm(norm: Norm, constant: Tensor) -> Tensor:
    """(channels,) what a batch norm in eval mode makes of constants."""

    def vector(given: Tensor | None, otherwise: float) -> Tensor:
        if given is None:
            return torch.full_like(constant, otherwise)
        return given.detach().double().cpu()

    weight, bias = vector(norm.weight, 1), vector(norm.bias, 0)
    mean, variance = vector(norm.running_mean, VARIES), vector(norm.running_var, VARIES)
    result = (constant - mean) * torch.rsqrt(variance + norm.eps) * weight + bias
    return torch.where(weight == 0, bias, result)
