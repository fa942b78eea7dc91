"""Which norm follows which layer, which layers run, and which make the model's output.

Read from the data flow, not from the order in which modules were registered: in a pre-activation
network the two disagree.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
NORM = (_BatchNorm,)
LAYERS = (*WEIGHTED, *NORM, nn.MultiheadAttention, nn.RNNBase)
_FACTS = {"shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class Flow:
    """What the wrapping needs to know of a model's data flow.

    Attributes
    ----------
    norm_inputs
        Name of every norm that reads the output of one convolution or linear layer, and nothing
        else does, to that layer's name.
    outputs
        Names of the layers that no other layer follows (a classifier): their neurons are the
        model's output.
    runs
        Names of the layers that run in eval mode, and whose parameters nothing else reads: all
        that their weights do, their outputs do.
    """

    norm_inputs: dict[str, str]
    outputs: set[str]
    runs: set[str]


def data_flow(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Flow:
    """Trace the model symbolically, or, where that fails, record one run on `example_inputs`.

    Raises
    ------
    ValueError
        The model cannot be traced and there are no example inputs.
    """
    try:
        graph = trace(model)
    except Exception as error:
        if example_inputs is None:
            raise ValueError(
                f"{type(model).__name__} cannot be traced symbolically ({error}); pass "
                "example_inputs, a tuple of inputs to run it on, so that its data flow can be "
                "recorded"
            ) from error
        return _recorded_flow(model, example_inputs)
    return _traced_flow(model, graph)


class Tracer(fx.Tracer):
    """Layers that can be masked are leaves; what has such layers inside is not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LAYERS):
            return True
        has_layers = any(isinstance(inner, LAYERS) for inner in m.modules())
        return not has_layers and super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph in eval mode: `training` is read, and kept, by a trace."""
    with _eval_mode(model):
        return Tracer().trace(model)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """What a node calls: a module's class, a function, or the name of a method."""
    if node.op == "call_module":
        return type(modules[str(node.target)])
    return node.target if node.op in ("call_function", "call_method") else None


def _traced_flow(model: nn.Module, graph: fx.Graph) -> Flow:
    names = {id(module): name for name, module in model.named_modules()}

    def called(node: Any, kinds: tuple[type[nn.Module], ...]) -> str | None:
        """The first name of the module that a node calls, if it is of one of the kinds."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = model.get_submodule(str(node.target))
        return names[id(module)] if isinstance(module, kinds) else None

    owners = _owners(model)
    pairs = _Pairs()
    runs, read = set(), set[str]()
    for node in graph.nodes:
        if node.op == "get_attr" and not all(map(reads_facts, node.users)):
            read |= owners.get(id(operator.attrgetter(str(node.target))(model)), set())
        name = called(node, LAYERS)
        if name is not None:
            runs.add(name)
        norm = called(node, NORM)
        if norm is not None:
            source = node.args[0] if node.args else node.kwargs["input"]
            read_by_others = isinstance(source, fx.Node) and len(source.users) > 1
            layer = None if read_by_others else called(source, WEIGHTED)
            pairs.add(norm, layer if _has_channels_of(layer, norm, model) else None)
    norm_inputs = pairs.unique()

    def starts_layer(node: fx.Node) -> bool:
        name = called(node, LAYERS)
        return name is not None and name not in norm_inputs

    followed: dict[fx.Node, bool] = {}
    outputs = set()
    for node in reversed(graph.nodes):
        followed[node] = any(followed[user] or starts_layer(user) for user in node.users)
        name = called(node, LAYERS)
        if name is not None and not followed[node]:
            outputs.add(name)
    return Flow(norm_inputs, outputs, runs - read)


def reads_facts(node: fx.Node) -> bool:
    """Whether a node reads of a tensor what says nothing of its values and memory format."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in _FACTS


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """By the identity of every parameter, the names of the layers that have it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(name)
    return owners


def _has_channels_of(layer: str | None, norm: str, model: nn.Module) -> bool:
    """Whether a norm's channels can be a layer's neurons: a linear one's are on the last axis."""
    if layer is None:
        return False
    module = model.get_submodule(layer)
    neurons = getattr(module, "out_features", getattr(module, "out_channels", None))
    return isinstance(module, WEIGHTED) and neurons == model.get_submodule(norm).num_features


class _Pairs:
    """Every reading of a layer by a norm; layers called in several places have several."""

    def __init__(self) -> None:
        self.layers: dict[str, set[str | None]] = {}

    def add(self, norm: str, layer: str | None) -> None:
        self.layers.setdefault(norm, set()).add(layer)

    def unique(self) -> dict[str, str]:
        """Norms with one layer each, whose layer has one norm."""
        readers: dict[str | None, int] = {}
        for layers in self.layers.values():
            for layer in layers:
                readers[layer] = readers.get(layer, 0) + 1
        return {
            norm: layer
            for norm, (layer, *others) in ((n, tuple(ls)) for n, ls in self.layers.items())
            if layer is not None and not others and readers[layer] == 1
        }


def _recorded_flow(model: nn.Module, example_inputs: tuple[Any, ...]) -> Flow:
    recording = _Recording(model)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            enter, leave = partial(recording.enter, name), partial(recording.leave, name)
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    try:
        with _eval_mode(model), torch.no_grad(), recording:
            result = model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return recording.flow(result)


class _Recording(TorchFunctionMode):
    """What every tensor of one run comes from: its sources, the layers last on the way to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owners = _owners(model)
        self.model = model
        self.running: list[str] = []  # layers, one inside the other
        self.calls: list[_Call] = []
        self.read: set[str] = set()
        self.sources: dict[int, set[str]] = {}
        self.made_by: dict[int, str] = {}
        self.readers: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # keeps identities unique while recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        if func is Tensor.__setitem__:
            made = given[:1]
        for tensor in given if made else ():
            owners = self.owners.get(id(tensor), set())
            if owners.isdisjoint(self.running):
                self.read |= owners
        if made and not self.running:
            sources = self._read(given)
            for tensor in made:
                self.made_by.pop(id(tensor), None)
                self.sources[id(tensor)] = sources
            self.alive += made
        return result

    def enter(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A layer starts to run."""
        given = _tensors((args, kwargs))
        self.calls.append(_Call(name, id(given[0]), self.made_by.get(id(given[0])), set()))
        if not self.running:
            self.calls[-1].sources.update(self._read(given))
        self.running.append(name)

    def leave(self, name: str, layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A layer has run."""
        self.running.pop()
        for tensor in _tensors(result):
            self.sources[id(tensor)], self.made_by[id(tensor)] = {name}, name
            self.alive.append(tensor)

    def flow(self, result: Any) -> Flow:
        """What was recorded, given what the model returned."""
        pairs = _Pairs()
        for call in self.calls:
            if isinstance(self.model.get_submodule(call.name), NORM):
                layer = call.made_by if self.readers[call.input] == 1 else None
                pairs.add(
                    call.name, layer if _has_channels_of(layer, call.name, self.model) else None
                )
        norm_inputs = pairs.unique()
        last = self._read(_tensors(result)) or {call.name for call in self.calls[-1:]}
        followed = (call.sources for call in self.calls if call.name not in norm_inputs)
        outputs = last.difference(*followed)
        outputs |= {norm_inputs[name] for name in outputs & norm_inputs.keys()}
        return Flow(norm_inputs, outputs, {call.name for call in self.calls} - self.read)

    def _read(self, tensors: list[Tensor]) -> set[str]:
        """Their sources; this is one more reading of them."""
        self.readers.update(map(id, tensors))
        return set[str]().union(*(self.sources.get(id(tensor), set()) for tensor in tensors))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Call(NamedTuple):
    """A call of a layer: its first input, the layer that made that, and the inputs' sources."""

    name: str
    input: int
    made_by: str | None
    sources: set[str]
