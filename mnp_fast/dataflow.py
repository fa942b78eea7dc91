"""Which norm follows which convolution, and which layers make the model's output.

Read from the data flow, not from the order in which modules were registered: in a pre-activation
network the two disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

WEIGHTED = (nn.Conv2d, nn.Linear)
NORM = (nn.BatchNorm2d,)


@dataclass(frozen=True)
class Flow:
    """What the wrapping needs to know of a model's data flow.

    Attributes
    ----------
    norm_inputs
        Name of every norm that reads the output of one convolution, and nothing else does, to
        that convolution's name.
    outputs
        Names of the layers that no other layer follows (a classifier): their neurons are the
        model's output.
    """

    norm_inputs: dict[str, str]
    outputs: set[str]


def data_flow(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Flow:
    """Trace the model symbolically, or, where that fails, record one run on `example_inputs`.

    Raises
    ------
    ValueError
        The model cannot be traced and there are no example inputs.
    """
    try:
        graph = Tracer().trace(model)
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
    """Layers that can be masked are leaves, whoever their class belongs to."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*WEIGHTED, *NORM)) or super().is_leaf_module(m, module_qualified_name)


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

    pairs = _Pairs()
    for node in graph.nodes:
        norm = called(node, NORM)
        if norm is not None:
            source = node.args[0] if node.args else node.kwargs["input"]
            read_by_others = isinstance(source, fx.Node) and len(source.users) > 1
            pairs.add(norm, None if read_by_others else called(source, WEIGHTED))
    norm_inputs = pairs.unique()

    def starts_layer(node: fx.Node) -> bool:
        norm = called(node, NORM)
        return called(node, WEIGHTED) is not None or (norm is not None and norm not in norm_inputs)

    followed: dict[fx.Node, bool] = {}
    outputs = set()
    for node in reversed(graph.nodes):
        followed[node] = any(followed[user] or starts_layer(user) for user in node.users)
        name = called(node, (*WEIGHTED, *NORM))
        if name is not None and not followed[node]:
            outputs.add(name)
    return Flow(norm_inputs, outputs)


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
    made_by: dict[int, str] = {}
    alive: list[Tensor] = []  # keeps identities unique while recording
    order: list[str] = []
    pairs = _Pairs()

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, NORM):
            pairs.add(name, made_by.get(id(args[0])))
        made_by[id(output)] = name
        alive.append(output)
        order.append(name)

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(
            lambda module, args, output: record(name, module, args, output)
        )

    watched = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (*WEIGHTED, *NORM))
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*example_inputs)
    finally:
        for handle in watched:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    norm_inputs = pairs.unique()
    last = order[-1:]
    return Flow(norm_inputs, {*last, *(norm_inputs.get(name, name) for name in last)})
