"""What follows a layer in a traced model, computed again for many silenced neurons at a time.

A *pair* is a neuron that is silenced and a sample. Silencing changes one channel of one value. As
long as what follows works channel by channel, one channel is all that is computed. A convolution
or linear layer that reads it adds to its known output what one input channel changes. Only then
whole values follow, in batches of pairs, and pairs whose channel did not change are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..dataflow import kind_of, reads_facts
from ..fusion import ADDS, ELEMENTWISE, RELUS, block_graph, needs_own_forward, run_block
from ..layers import MaskedHeads, MaskedLayer, block_terms, padded
from ..reference import per_neuron
from ..wrap import masked_layers

VALUES = 2**21  # numbers in the largest tensor of a batch of pairs

_POOLS = {
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
}
_KEEP = {F.dropout, nn.Dropout, nn.Dropout2d, nn.Identity, "contiguous"}
_FLAT = {torch.flatten, nn.Flatten, "flatten"}
_VIEWS = {"view", "reshape", torch.reshape}
_MEANS = {torch.mean, "mean"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
# Run on whole values, sample by sample, whatever the batch.
_WHOLE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def block_gain(conv: nn.Conv2d | None, norm: Any) -> Tensor:
    """What a block multiplies each neuron's sum by."""
    terms = block_terms(conv, norm)
    return terms.mask if terms.scale is None else terms.mask * terms.scale


class Channel(NamedTuple):
    """A value (P, K, *) of P pairs that differs from the known one in one channel of each."""

    at: Tensor  # (P,)
    values: Tensor  # (P, 1, *)


class Known(dict[fx.Node, Any]):
    """The value of every node for a batch of samples, without any neuron silenced.

    Attributes
    ----------
    before_relu
        Outputs of blocks without their ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before_relu: dict[fx.Node, Tensor] = {}


Changed = Channel | Tensor
Rule = Callable[[fx.Node, "_Run"], Changed]


class Tail:
    """The traced graph of a masked model in eval mode.

    Raises
    ------
    Exception
        It has no graph that says all that it does.
    """

    def __init__(self, masked: nn.Module) -> None:
        modules = list(masked.modules())
        if needs_own_forward(masked, modules):
            raise ValueError("the model has hooks, or a tool of torch is at work")
        graph = block_graph(masked)
        self.root, self.modules = masked, dict(masked.named_modules())
        self.nodes = list(graph.nodes)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if any(not node.args for node in inputs[1:]):
            raise ValueError("the model takes more than one input")
        self.images = inputs[0]
        [self.logits] = self.nodes[-1].args
        self.facts, self.batch_facts = _facts(self.nodes)
        # What is made from the images, facts such as sizes left out, has the samples first.
        self.has_samples: set[fx.Node] = {self.images}
        for node in self.nodes:
            if node not in self.facts and not self.has_samples.isdisjoint(node.all_input_nodes):
                self.has_samples.add(node)
        names = {id(layer): name for name, layer in masked_layers(masked).items()}
        self.owners: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            for layer in self.called(node):
                if id(layer) in names:
                    self.owners.setdefault(names[id(layer)], []).append(node)
        self._columns: dict[fx.Node, Tensor] = {}
        self._rules: dict[fx.Node, Rule | None] = {}

    def called(self, node: fx.Node) -> list[nn.Module]:
        """The modules that a node runs."""
        if node.target is run_block:
            return [self.modules[str(p.target)] for p in node.args[:2] if isinstance(p, fx.Node)]
        return [self.modules[str(node.target)]] if node.op == "call_module" else []

    def known(self, images: Tensor) -> Known:
        """The value of every node, computed once."""
        values = Known()
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = images if node is self.images else node.args[0]
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.root)
            elif node.target is run_block:
                conv, norm, x, residual, relu, algorithm = self.arguments(node, values.__getitem__)
                y = run_block(conv, norm, x, residual, False, algorithm)
                values.before_relu[node], values[node] = y, F.relu(y) if relu else y
            elif node.op != "output":
                values[node] = self.call(node, values.__getitem__)
        return values

    def arguments(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """A node's positional arguments, with values in place of nodes."""
        return fx.node.map_arg(node.args, value_of)

    def call(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """What a node computes; what it is given stays as it is."""
        args = self.arguments(node, value_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
        if node.target is run_block:
            return run_block(*args)
        kind = kind_of(node, self.modules)
        if kind in RELUS:
            return F.relu(args[0] if args else kwargs["input"])
        if kind is operator.iadd or kind in ELEMENTWISE or _works_in_place(node):
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target if node.op == "call_function" else self.called(node)[0]
        return function(*args, **kwargs)

    def after(self, name: str) -> list[fx.Node]:
        """The nodes whose values silencing a neuron of a layer changes, in order."""
        changed = set(self.owners[name])
        for node in self.nodes:
            if node in self.has_samples and not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
        return [node for node in self.nodes if node in changed and node.op != "output"]

    def can_run(self, name: str, known: Known) -> bool:
        """Whether all that follows a layer, and where its neurons are, is understood."""
        if name not in self.owners or isinstance(self.modules[name], MaskedHeads):
            return False
        after = self.after(name)
        for node in after:
            if node not in self._rules:
                is_tensor = isinstance(known[node], Tensor)
                self._rules[node] = self._rule(node, known) if is_tensor else None
        return self.logits in after and all(self._rules[node] is not None for node in after)

    def rule(self, node: fx.Node) -> Rule:
        """How a changed node of what `can_run` is computed."""
        rule = self._rules[node]
        assert rule is not None
        return rule

    def silenced(
        self, known: Known, name: str, neurons: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Silence every neuron on every sample of the known values.

        Parameters
        ----------
        known
            What `known` returned.
        name
            A layer for which `can_run` holds.
        neurons
            Their indices, int64 (J,).

        Yields
        ------
        tuple of Tensor
            Positions in `neurons` and samples, int64 (P,), and the logits (P, classes) of these
            pairs. For pairs that are not there, the logits are as known.
        """
        after = self.after(name)
        first = after[0]
        silent = self._silent_channels(known, name, first, neurons)
        old = known[first][:, neurons]
        differs = (silent != old).reshape(*old.shape[:2], -1).any(2)
        position, sample = differs.T.nonzero(as_tuple=True)  # samples of a neuron side by side
        size = max(1, VALUES // max(known[node][0].numel() for node in after))
        for p, n in zip(position.split(size), sample.split(size), strict=True):
            if not len(p):
                continue
            run = _Run(self, known, name, neurons[p], n)
            run.state[first] = Channel(neurons[p], silent[n, p][:, None])
            yield p, n, run.logits(after)

    def _silent_channels(self, known: Known, name: str, node: fx.Node, neurons: Tensor) -> Tensor:
        """Channels (N, J, *) of the first node that a layer changes, where these have mask 0."""
        y = known[node]
        constant = self.constant(node, name)
        channels = y.new_zeros(()) if constant is None else per_neuron(constant[neurons], y.dim())
        channels = channels.expand_as(y[:, neurons])
        if node.target is run_block:
            residual = known.get(node.args[3]) if isinstance(node.args[3], fx.Node) else None
            if residual is not None:
                channels = channels + residual.expand_as(y)[:, neurons]
            if node.args[4]:
                channels = F.relu(channels)
        return channels

    def constant(self, node: fx.Node, name: str) -> Tensor | None:
        """What mask 0 leaves of a layer's neurons, (neurons,), before residual and ReLU."""
        if node.target is run_block:
            conv, norm = self.parts(node)
            return block_terms(conv, norm).bias
        layer = self.modules[name]
        return layer.terms().bias

    def parts(self, node: fx.Node) -> tuple[Any, Any]:
        """A block's convolution and norm; None for one that it does not have."""
        conv, norm = (
            self.modules[str(part.target)] if isinstance(part, fx.Node) else None
            for part in node.args[:2]
        )
        return conv, norm

    def _rule(self, node: fx.Node, known: Known) -> Rule | None:
        """How a changed node is computed; None where this is not known to be right."""
        kind, y = kind_of(node, self.modules), known[node]
        sources = [part for part in node.all_input_nodes if part in self.has_samples]
        if not all(isinstance(known[part], Tensor) for part in sources):
            return None
        x = known[sources[0]]
        if kind in _VIEWS:
            flat = len(node.args) == 3 and node.args[2] == -1 and _axis_of(node.args[1]) == 0
            return _flatten if flat and not node.kwargs else None
        if not self.batch_facts.isdisjoint(node.all_input_nodes):
            return None  # a batch of pairs has another size
        if node.target is run_block:
            residual = node.args[3]
            images = not isinstance(residual, fx.Node) or isinstance(known[residual], Tensor)
            return _block if x.dim() == 4 and images else None
        if kind in RELUS or (kind in ELEMENTWISE and kind is not nn.PReLU) or kind in _KEEP:
            return _each_channel
        if kind is nn.PReLU:
            return _whole
        if kind in ADDS | _PRODUCTS:
            if len(node.args) != 2 or node.kwargs:
                return None
            if len(node.all_input_nodes) == 1 and not all(a is sources[0] for a in node.args):
                return _each_channel  # the other is a number
            if any(known[part].dim() != y.dim() for part in sources):
                return None
            plain = len(sources) == len(node.all_input_nodes)
            alike = plain and all(known[part].shape == y.shape for part in sources)
            return _add if kind in ADDS and alike else _whole
        if kind in _POOLS:
            return _each_channel if x.dim() == 4 and y.dim() == 4 else None
        if kind in _FLAT:
            start = self._argument(node, 1, "start_dim", 1 if kind is nn.Flatten else 0)
            end = self._argument(node, 2, "end_dim", -1)
            return _flatten if start in (1, 1 - x.dim()) and end in (-1, x.dim() - 1) else None
        if kind in _MEANS:
            axes = self._argument(node, 1, "dim", None)
            axes = (axes,) if isinstance(axes, int) else axes
            plain = isinstance(axes, (tuple, list)) and "dtype" not in node.kwargs
            return _each_channel if plain and all(a % x.dim() > 1 for a in axes) else None
        if kind is torch.cat:
            axis = self._argument(node, 1, "dim", 0)
            return _cat if axis % x.dim() == 1 else None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            plain_class = getattr(type(module), "plain", type(module))
            if plain_class is nn.Linear:
                return _linear if x.dim() == 2 else None
            if plain_class in _WHOLE:
                return _whole if x.dim() == module.weight.dim() else None
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                kept = module.running_mean is not None and module.running_var is not None
                return _whole if kept else None
        return None

    def _argument(self, node: fx.Node, place: int, name: str, default: Any) -> Any:
        if node.op == "call_module":
            return getattr(self.modules[str(node.target)], name)
        return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

    def by_channel(self, node: fx.Node) -> Tensor:
        """A convolution's weights (C, taps, K) for one input channel, times mask and scale."""
        if node not in self._columns:
            conv, norm = self.parts(node)
            gain = block_gain(conv, norm)
            weight = (conv.weight * gain.reshape(-1, 1, 1, 1)).detach().flatten(2)
            inner = weight.shape[1]
            columns = weight.new_zeros(conv.in_channels, weight.shape[2], len(weight))
            outer = len(weight) // conv.groups
            for g in range(conv.groups):
                mine = slice(g * outer, (g + 1) * outer)
                columns[g * inner : (g + 1) * inner, :, mine] = weight[mine].permute(1, 2, 0)
            self._columns[node] = columns
        return self._columns[node]


class _Run:
    """One batch of pairs on its way through the tail."""

    def __init__(self, tail: Tail, known: Known, name: str, index: Tensor, sample: Tensor) -> None:
        self.tail, self.known, self.name = tail, known, name
        self.index, self.sample = index, sample
        self.pairs = torch.arange(len(sample), device=sample.device)
        self.state: dict[fx.Node, Changed] = {}

    def logits(self, after: list[fx.Node]) -> Tensor:
        tail = self.tail
        last = {part: node for node in after for part in node.all_input_nodes}
        for node in after[1:]:
            if node in tail.owners[self.name]:
                self.state[node] = self._silence_again(node)
            else:
                self.state[node] = tail.rule(node)(node, self)
            for part in node.all_input_nodes:
                if last[part] is node and part is not tail.logits:
                    self.state.pop(part, None)
        return self.whole(tail.logits)

    def whole(self, node: fx.Node) -> Any:
        """The value of a node for every pair."""
        value = self.state.get(node)
        if isinstance(value, Tensor):
            return value
        known = self.known[node]
        if node not in self.tail.has_samples or not isinstance(known, Tensor):
            return known
        rows = take(known, self.sample)
        if value is not None:
            rows[self.pairs, value.at] = value.values[:, 0]
        return rows

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads that has samples."""
        return [part for part in node.all_input_nodes if part in self.tail.has_samples]

    def is_at(self, value: Changed | None, index: Tensor) -> bool:
        """Whether a value is as known but for these channels."""
        return value is None or (
            isinstance(value, Channel) and (value.at is index or torch.equal(value.at, index))
        )

    def channel(self, node: Any, index: Tensor) -> Tensor:
        """The channel (P, 1, *) of every pair, in a value that `is_at` these channels."""
        value = self.state.get(node)
        if isinstance(value, Channel):
            return value.values
        return self.known[node][self.sample, index][:, None]

    def change(self, node: fx.Node, index: Tensor) -> Tensor:
        """How far these channels are from the known ones."""
        return self.channel(node, index) - self.known[node][self.sample, index][:, None]

    def _silence_again(self, node: fx.Node) -> Tensor:
        """A layer that is called once more: all of it, and its silent neurons on top."""
        y: Tensor = self.tail.call(node, self.whole)
        constant = self.tail.constant(node, self.name)
        channel = torch.zeros_like(y[:, 0])
        if constant is not None:
            channel += constant[self.index].reshape(-1, *(1,) * (y.dim() - 2))
        if node.target is run_block:
            if isinstance(node.args[3], fx.Node):
                channel += self.whole(node.args[3]).expand_as(y)[self.pairs, self.index]
            if node.args[4]:
                channel = F.relu(channel)
        y[self.pairs, self.index] = channel
        return y


def _whole(node: fx.Node, run: _Run) -> Tensor:
    return run.tail.call(node, run.whole)


def _each_channel(node: fx.Node, run: _Run) -> Changed:
    [source] = run.sources(node)
    x = run.state[source]
    if isinstance(x, Tensor):
        return _whole(node, run)
    y: Tensor = run.tail.call(node, lambda part: x.values if part is source else run.known[part])
    return Channel(x.at, y)


def _flatten(node: fx.Node, run: _Run) -> Changed:
    [source] = run.sources(node)
    x = run.state[source]
    if isinstance(x, Channel) and x.values[0].numel() == 1 == run.known[source][0, 0].numel():
        return Channel(x.at, x.values.flatten(1))
    return run.whole(source).flatten(1)


def _add(node: fx.Node, run: _Run) -> Changed:
    a, b = (run.state.get(part) for part in node.args)  # type: ignore[arg-type]
    index = a.at if isinstance(a, Channel) else b.at if isinstance(b, Channel) else None
    if index is None or not run.is_at(a, index) or not run.is_at(b, index):
        return _whole(node, run)
    return Channel(index, sum(run.channel(part, index) for part in node.args))  # type: ignore


def _cat(node: fx.Node, run: _Run) -> Changed:
    given = node.args[0] if node.args else node.kwargs["tensors"]
    assert isinstance(given, (tuple, list))
    changed = [i for i, part in enumerate(given) if part in run.state]
    x = run.state[given[changed[0]]]
    if len(changed) > 1 or isinstance(x, Tensor):
        return _whole(node, run)
    before = sum(run.known[part].shape[1] for part in given[: changed[0]])
    return Channel(x.at + before, x.values)


def _linear(node: fx.Node, run: _Run) -> Tensor:
    [source] = run.sources(node)
    x = run.state[source]
    if isinstance(x, Tensor):
        return _whole(node, run)
    layer: Any = run.tail.called(node)[0]
    y = take(run.known[node], run.sample)
    change = run.change(source, x.at)[:, 0, None] * layer.weight.T[x.at]
    return y.add_(change * layer.mask if isinstance(layer, MaskedLayer) else change)


def _block(node: fx.Node, run: _Run) -> Changed:
    conv, norm = run.tail.parts(node)
    source, residual, relu = node.args[2], node.args[3], node.args[4]
    assert isinstance(source, fx.Node)
    x = run.state.get(source)
    added = run.state.get(residual) if isinstance(residual, fx.Node) else None
    if isinstance(residual, fx.Node) and run.known[residual].shape != run.known[node].shape:
        return _whole(node, run)
    known = run.known.before_relu[node]
    if isinstance(x, Channel) and conv is not None:
        z = _one_channel_more(node, conv, x, known, run)
    elif x is None and isinstance(added, Tensor):
        z = take(known, run.sample)
    else:
        index = x.at if isinstance(x, Channel) else getattr(added, "at", None)
        if index is None or not run.is_at(x, index) or not run.is_at(added, index):
            return _whole(node, run)
        channel = known[run.sample, index][:, None]
        if x is not None:
            gain = block_gain(conv, norm)[index].reshape(-1, 1, 1, 1)
            channel = channel + gain * run.change(source, index)
        if added is not None:
            channel = channel + run.change(residual, index)  # type: ignore[arg-type]
        return Channel(index, F.relu(channel) if relu else channel)
    if isinstance(added, Tensor):
        z += added - take(run.known[residual], run.sample)  # type: ignore[index]
    elif isinstance(added, Channel):
        change = run.change(residual, added.at)  # type: ignore[arg-type]
        z[run.pairs, added.at] += change[:, 0]
    return z.relu_() if relu else z


def _one_channel_more(
    node: fx.Node, conv: nn.Conv2d, x: Channel, known: Tensor, run: _Run
) -> Tensor:
    """A block's output, before its ReLU, where one channel of its input is another."""
    source = node.args[2]
    assert isinstance(source, fx.Node)
    change, padding = padded(conv, run.change(source, x.at))
    taps = F.unfold(change, conv.kernel_size, conv.dilation, padding, conv.stride)
    rows = known.permute(0, 2, 3, 1)[run.sample]  # copied: (P, H, W, K)
    pixels = rows.flatten(1, 2)
    pixels.baddbmm_(taps.transpose(1, 2), run.tail.by_channel(node)[x.at])
    return rows.permute(0, 3, 1, 2)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Copies of rows, in the memory format of images that are channels-last."""
    if values.dim() == 4:
        return values.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)
    return values[rows]


def _works_in_place(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") and not name.endswith("__")


def _facts(nodes: list[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What says nothing of a tensor's values, such as a size; and what of it depends on the batch.

    What is computed from facts alone is one as well.
    """
    facts: set[fx.Node] = set()
    of_batch: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if not sources or not (reads_facts(node) or facts.issuperset(sources)):
            continue
        facts.add(node)
        axis = _axis_of(node)
        inherited = not reads_facts(node) and not of_batch.isdisjoint(sources)
        if axis == 0 or (axis is None and (_is_shape(node) or inherited)):
            of_batch.add(node)
    return facts, of_batch


def _axis_of(part: Any) -> Any:
    """The axis, counted from 0, of which a node is the size; None if it is anything else."""
    if not isinstance(part, fx.Node):
        return None
    is_item = part.target is operator.getitem and _is_shape(part.args[0])
    is_size = part.target == "size" and len(part.args) == 2
    axis = part.args[1] if is_item or is_size else None
    return axis if isinstance(axis, int) and axis >= 0 else None


def _is_shape(part: Any) -> bool:
    return isinstance(part, fx.Node) and (
        (part.target == "size" and len(part.args) == 1)
        or (part.target is getattr and part.args[1] == "shape")
    )
