"""Operations in place, in a traced graph whose order and copies are to change."""

from __future__ import annotations

import inspect
import operator

import torch
from torch import fx, nn

# What gives memory of its own; others may give their input's.
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.Linear,
)
_FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat}


def hidden_change(graph: fx.Graph, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The first operation in place whose effect is read by another name than its result's.

    Where there is none, values may be copied and blocks moved without that anybody sees it.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = _changed(node, modules)
        if changed is None:
            continue
        names, found = {changed}, [changed]
        while found:
            source = found.pop()
            if not _is_fresh(source, modules):
                found += set(source.all_input_nodes) - names
                names.update(source.all_input_nodes)
        readers = {user for name in names for user in name.users} - names - {node}
        if any(position[user] > position[node] for user in readers) or len(changed.users) > 1:
            return node
    return None


def _changed(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The value that a node changes in place."""
    first = next((part for part in node.args if isinstance(part, fx.Node)), None)
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.op == "call_module":
        return first if getattr(modules[str(node.target)], "inplace", False) else None
    if node.op not in ("call_function", "call_method"):
        return None
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    return first if in_place or _is_told_inplace(node) else None


def _is_told_inplace(node: fx.Node) -> bool:
    if isinstance(node.target, str):
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a built-in function: it has no such argument
        return False
    return bool(given.arguments.get("inplace", False))


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _LAYERS)
    return node.target in _FUNCTIONS and "out" not in node.kwargs
