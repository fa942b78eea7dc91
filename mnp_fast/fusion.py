"""Convolution, norm, residual and activation as one operator, in a model that stays itself.

A fused model keeps its class, modules and parameters. It gets a `forward` that runs the model's
traced graph with every such block as one operator, channels-last in between. Where that could
differ from the model's own `forward` (train mode, hooks on its modules, a compiler, a transform of
`torch.func` or autocast at work), its own runs.
"""

from __future__ import annotations

import operator
from types import CodeType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .channel_means import conv_means
from .dataflow import kind_of, reads_facts, trace
from .inplace import hidden_change
from .layers import (
    MaskedBatchNorm2d,
    MaskedConv2d,
    MaskedLayer,
    MaskedSyncBatchNorm,
    block_terms,
    padded,
)
from .module_list import CurrentModules
from .ops import masked_affine, masked_conv2d
from .ops._common import in_transform
from .ops.conv import allows, output_size
from .region import Region, Step

_CONVS = (nn.Conv2d, MaskedConv2d)
_NORMS = (nn.BatchNorm2d, MaskedBatchNorm2d, nn.SyncBatchNorm, MaskedSyncBatchNorm)
ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, nn.ReLU, "relu", "relu_"}
ELEMENTWISE = {
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish),
    *(nn.PReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh),
    *(F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish),
    *(F.relu6, F.selu, F.silu, F.softplus),
    *(torch.sigmoid, torch.tanh, "sigmoid", "tanh"),
}
# What takes images of any memory format; a result may have the one it was given.
_ANY_FORMAT = {
    *ELEMENTWISE,
    *ADDS,
    *RELUS,
    *_CONVS,
    *_NORMS,
    operator.mul,
    torch.cat,
    torch.flatten,
    torch.mean,
    F.avg_pool2d,
    F.max_pool2d,
    F.adaptive_avg_pool2d,
    F.dropout,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
    "flatten",
    "mean",
}


class FusedForward:
    """The `forward` of a fused model; it belongs to `root` and is copied and pickled with it.

    Parameters
    ----------
    root
        The masked model.
    algorithm
        Of convolutions that have no mask of their own, as in `mnp_fast.wrap`.
    """

    def __init__(self, root: nn.Module, algorithm: str) -> None:
        self.root, self.algorithm = root, algorithm
        self._graph: fx.GraphModule | None = None
        self._blocks: list[tuple[str, ...]] = []
        self._tensors: list[str] = []
        self._modules = CurrentModules(root)
        self._seen: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # A graph holds the modules of its root, and a copy of the root has others.
        state = {**self.__dict__, "_graph": None, "_tensors": [], "_seen": []}
        del state["_modules"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._modules = CurrentModules(self.root)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        modules = self._modules.current()
        if needs_own_forward(self.root, modules):
            return type(self.root).forward(self.root, *args, **kwargs)
        return self._current(modules).forward(*args, **kwargs)

    @property
    def __wrapped__(self) -> MethodType:
        """The model's own `forward`, whose signature `torch.export` asks for."""
        return MethodType(type(self.root).forward, self.root)

    @property
    def __code__(self) -> CodeType:
        """That of the model's own `forward`, which `torch.export` asks for too."""
        return type(self.root).forward.__code__

    def blocks(self) -> list[tuple[str, ...]]:
        """Names of the convolution and norm of every block, in the order they run."""
        self._current(self._modules.current())
        return self._blocks

    def _current(self, modules: list[nn.Module]) -> fx.GraphModule:
        """The graph, built anew where modules or tensors of the root were replaced."""
        if self._graph is None or not self._is_seen(modules):
            graph = block_graph(self.root, self.algorithm)
            read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
            self._tensors = [
                name
                for name in dict.fromkeys(read)
                if isinstance(operator.attrgetter(name)(self.root), Tensor)
            ]
            blocks = [node for node in graph.nodes if node.target is run_block]
            self._blocks = [
                tuple(str(part.target) for part in node.args[:2] if isinstance(part, fx.Node))
                for node in blocks
            ]
            self._graph = runnable(self.root, graph)
            self._seen = [modules, *self._read()]
        return self._graph

    def _is_seen(self, modules: list[nn.Module]) -> bool:
        return all(map(operator.is_, self._seen, (modules, *self._read())))

    def _read(self) -> list[Tensor]:
        """Tensors that the graph reads by name."""
        return [operator.attrgetter(name)(self.root) for name in self._tensors]


def block_graph(masked: nn.Module, algorithm: str = "auto") -> fx.Graph:
    """The graph of a masked model in eval mode, with every block as one call of `run_block`.

    Raises
    ------
    Exception
        The model cannot be traced, or it works in place on what is read by another name.
    """
    graph = trace(masked)
    change = hidden_change(graph, dict(masked.named_modules()))
    if change is not None:
        raise ValueError(f"{change} works in place on what is read by another name as well")
    _fuse(graph, masked, algorithm)
    return graph


def runnable(masked: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs the model's `block_graph`, blocks that follow each other as one region."""
    model = fx.GraphModule(masked, graph)
    _group(model, dict(masked.named_modules()))
    return model


def needs_own_forward(masked: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether a graph in eval mode could differ from the `forward` of a model of these modules."""
    return _is_watched() or any(map(_differs, modules[1:])) or masked.training


def _is_watched() -> bool:
    """Whether a tool is at work that must see every module run, or every operator of torch."""
    return bool(
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._is_any_autocast_enabled()
        or nn.modules.module._has_any_global_hook()
    )


def _differs(module: nn.Module) -> bool:
    """Whether a graph would leave out what a module inside the model does."""
    return bool(
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fuse_blocks(masked: nn.Module, algorithm: str) -> None:
    """Give a masked model a fused `forward`, in place, if its graph can be traced."""
    if "forward" in vars(masked):
        return
    forward = FusedForward(masked, algorithm)
    try:
        blocks = forward.blocks()
    except Exception:
        return  # as in `data_flow`: a trace may fail in any way
    if blocks:
        masked.forward = forward


def fused_blocks(masked: nn.Module) -> list[tuple[str, ...]]:
    """Names of the convolution and norm of every block of a wrapped model that runs as one.

    Empty where the model is not fused.
    """
    forward = vars(masked).get("forward")
    return forward.blocks() if isinstance(forward, FusedForward) else []


def run_block(
    conv: nn.Conv2d | None,
    norm: nn.BatchNorm2d | None,
    x: Tensor,
    residual: Any,
    relu: bool,
    algorithm: str,
) -> Tensor:
    """``relu(norm(conv(x)) + residual)``, all parts optional, as one operator."""
    if x.dim() == 3:
        one = residual[None] if isinstance(residual, Tensor) and residual.dim() == 3 else residual
        return run_block(conv, norm, x[None], one, relu, algorithm)[0]
    terms, activation = block_terms(conv, norm), "relu" if relu else "none"
    x = x.contiguous(memory_format=torch.channels_last)
    if conv is None:
        if residual is None or _fits(residual, x, x.shape):
            return masked_affine(x, *terms, residual, activation=activation)
        y = masked_affine(x, *terms)
    else:
        x, padding = padded(conv, x)
        shape = output_size(x.shape, conv.weight.shape, conv.stride, padding, conv.dilation)
        options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "algorithm": getattr(conv, "algorithm", algorithm),
        }
        if residual is None or _fits(residual, x, shape):
            return masked_conv2d(x, conv.weight, *terms, residual, activation=activation, **options)
        y = masked_conv2d(x, conv.weight, *terms, **options)
    y = y + residual
    return F.relu(y) if relu else y


def run_region(region: Region, inputs: list[Any]) -> tuple[Tensor, ...]:
    """Several blocks, as one operator where that computes the same."""
    plan = region.plan(inputs)
    if plan is not None:
        made = list(plan.run(inputs))
        for i, step in enumerate(region.means, len(region.outputs)):
            bias = region.steps[step].conv.bias
            made[i] = made[i] if bias is None else made[i] + bias
        return tuple(made)
    values = list(inputs)
    for conv, norm, x, residual, relu, algorithm in region.steps:
        other = None if residual is None else values[residual]
        values.append(run_block(conv, norm, values[x], other, relu, algorithm))
    averaged = (region.steps[step] for step in region.means)
    means = (conv_means(step.conv, values[step.x]) for step in averaged)
    return (*(values[number] for number in region.outputs), *means)


def _fits(residual: Any, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the operators take the residual: it needs no broadcasting or conversion."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


class _Block:
    """The nodes of a block, found from the first of them on."""

    def __init__(self, first: fx.Node, modules: dict[str, nn.Module]) -> None:
        self.modules, self.nodes = modules, [first]
        self.conv = first if kind_of(first, modules) in _CONVS else None
        self.norm = None if self.conv else first
        self.residual: fx.Node | None = None
        self.relu = False
        if self.conv:
            self._take_norm()
        self._take_residual()
        self._take_relu()

    @property
    def is_masked(self) -> bool:
        return any(part is not None and self._has_mask(part) for part in (self.conv, self.norm))

    def _has_mask(self, node: fx.Node) -> bool:
        return isinstance(self.modules[str(node.target)], MaskedLayer)

    def _next(self) -> fx.Node | None:
        """The one reader of what the block computes so far."""
        users = list(self.nodes[-1].users)
        return users[0] if len(users) == 1 else None

    def _take_norm(self) -> None:
        node = self._next()
        if node is None or kind_of(node, self.modules) not in _NORMS:
            return
        # Two masks one after the other are more than the equation has.
        if _keeps_statistics(self.modules[str(node.target)]) and not (
            self._has_mask(self.nodes[0]) and self._has_mask(node)
        ):
            self.norm = node
            self.nodes.append(node)

    def _take_residual(self) -> None:
        node = self._next()
        if (
            node is None
            or kind_of(node, self.modules) not in ADDS
            or len(node.args) != 2
            or node.kwargs
        ):
            return
        others = [part for part in node.args if part is not self.nodes[-1]]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            self.residual = others[0]
            self.nodes.append(node)

    def _take_relu(self) -> None:
        node = self._next()
        if node is not None and kind_of(node, self.modules) in RELUS:
            self.relu = True
            self.nodes.append(node)


def _fuse(graph: fx.Graph, root: nn.Module, algorithm: str) -> None:
    """Replace blocks by calls of `run_block`, and keep channels-last from what may not take it."""
    modules = dict(root.named_modules())
    taken: set[fx.Node] = set()
    for node in list(graph.nodes):
        kind = kind_of(node, modules)
        starts = kind in _CONVS or (
            kind is MaskedBatchNorm2d and _keeps_statistics(modules[str(node.target)])
        )
        if not starts or node in taken:
            continue
        block = _Block(node, modules)
        if block.is_masked:
            taken.update(block.nodes)
            _replace(graph, block, modules, algorithm)
    _restore_formats(graph, modules)


def _replace(graph: fx.Graph, block: _Block, modules: dict[str, nn.Module], algorithm: str) -> None:
    first, last = block.nodes[0], block.nodes[-1]
    x = first.args[0] if first.args else first.kwargs["input"]
    if block.conv is not None:
        conv = modules[str(block.conv.target)]
        assert isinstance(conv, nn.Conv2d)
        algorithm = algorithm if allows(conv, algorithm) else "auto"
    with graph.inserting_before(last):
        parts = [
            None if part is None else graph.get_attr(str(part.target))
            for part in (block.conv, block.norm)
        ]
        fused = graph.call_function(run_block, (*parts, x, block.residual, block.relu, algorithm))
    last.replace_all_uses_with(fused)
    for node in reversed(block.nodes):
        graph.erase_node(node)


def _group(model: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Replace blocks that follow each other by one call of `run_region`."""
    region: list[fx.Node] = []
    for node in list(model.graph.nodes):
        if node.target is run_block and _can_join(node, modules):
            region.append(node)
        elif node.op != "get_attr" and region:
            _replace_region(model, region, modules)
            region = []
    for node in list(model.graph.nodes):
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)
    model.recompile()


def _can_join(block: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a region may have this block: a convolution that is padded with zeros by itself."""
    conv = block.args[0]
    module = modules[str(conv.target)] if isinstance(conv, fx.Node) else None
    return (
        isinstance(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and isinstance(block.args[2], fx.Node)
    )


def _replace_region(
    model: fx.GraphModule, blocks: list[fx.Node], modules: dict[str, nn.Module]
) -> None:
    inside = set(blocks)
    inputs = dict.fromkeys(
        part
        for block in blocks
        for part in block.args[2:4]
        if isinstance(part, fx.Node) and part not in inside
    )
    number = {node: i for i, node in enumerate((*inputs, *blocks))}

    def step(block: fx.Node) -> Step:
        conv, norm, x, residual, relu, algorithm = cast("tuple[Any, ...]", block.args)
        return Step(
            modules[conv.target],  # type: ignore[arg-type]
            norm and modules[norm.target],  # type: ignore[arg-type]
            number[x],
            residual and number[residual],
            relu,
            algorithm,
        )

    means = _means_of(model.graph, blocks, modules)
    inside |= means.keys()
    outputs = [block for block in blocks if not inside.issuperset(block.users)]
    region = Region(
        [step(block) for block in blocks],
        [number[block] for block in outputs],
        [blocks.index(block) for block in means.values()],
    )
    name = f"region_of_{blocks[0].name}"
    setattr(model, name, region)
    with model.graph.inserting_before(blocks[-1]):
        node = model.graph.create_node("get_attr", name)
        values = model.graph.call_function(run_region, (node, list(inputs)))
        for i, made in enumerate((*outputs, *means)):
            value = model.graph.call_function(operator.getitem, (values, i))
            made.replace_all_uses_with(value, lambda user: user not in inside)
    for replaced in (*means, *reversed(blocks)):
        model.graph.erase_node(replaced)


def _means_of(
    graph: fx.Graph, blocks: list[fx.Node], modules: dict[str, nn.Module]
) -> dict[fx.Node, fx.Node]:
    """Nodes that ask for the means of a block's convolution, and these blocks.

    Of a masked convolution they are not those of what its weights compute.
    """
    asked: dict[Any, fx.Node] = {
        node.args: node for node in graph.nodes if node.target is conv_means
    }
    found: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        conv, _, x = cast("tuple[Any, ...]", block.args[:3])
        if (conv, x) in asked and not isinstance(modules[conv.target], MaskedLayer):
            found[asked[conv, x]] = block
    return found


def _restore_formats(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Make images contiguous again in front of what may ask for that, such as `view`."""
    any_format: set[fx.Node] = set()
    for node in list(graph.nodes):
        given = any_format.intersection(node.all_input_nodes)
        if node.target is run_block or (given and _takes_any_format(node, modules)):
            any_format.add(node)
        elif not reads_facts(node):
            for source in given:
                with graph.inserting_before(node):
                    plain = graph.call_method("contiguous", (source,))
                node.replace_input_with(source, plain)


def _takes_any_format(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    pool = modules.get(str(node.target)) if node.op == "call_module" else None
    gives_pair = node.kwargs.get("return_indices") or getattr(pool, "return_indices", False)
    return kind_of(node, modules) in _ANY_FORMAT and not gives_pair


def _keeps_statistics(norm: nn.Module) -> bool:
    return getattr(norm, "running_mean", None) is not None
