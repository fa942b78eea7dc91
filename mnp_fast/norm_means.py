"""Channel means of batch norms' inputs, from a forward pass that may be fused.

In a fused network there is no such input: norms are part of their block, and what a block's
convolution gives on average is one more output of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .channel_means import channel_means, conv_means
from .fusion import FusedForward, block_graph, needs_own_forward, run_block, runnable
from .module_list import CurrentModules

Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


class NormMeans:
    """Runs a network and looks at the inputs of some of its norms.

    Parameters
    ----------
    model
        A network, plain or wrapped, in eval mode. Its modules must stay the same ones.
    names
        Names of batch norms that run once in a forward pass.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.names = model, list(names)
        self.norms = [model.get_submodule(name) for name in self.names]
        self._graph: fx.GraphModule | None = None
        self._modules = CurrentModules(model)
        forward = vars(model).get("forward")
        if isinstance(forward, FusedForward):
            self._tap(block_graph(model, forward.algorithm))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of images (N, *), and the means (channels,) of all norms, one behind the other.

        Differentiable by the images.
        """
        if self._graph is None or needs_own_forward(self.model, self._modules.current()):
            return self._watched(images)
        logits, *means = self._graph(images)
        return logits, torch.cat(means)

    def _watched(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means: dict[nn.Module, Tensor] = {}
        with hooked(self.norms, lambda norm, x: means.update({norm: channel_means(x[0])})):
            logits = self.model(images)
        return logits, torch.cat([means[norm] for norm in self.norms])

    def _tap(self, graph: fx.Graph) -> None:
        """Make the means outputs of the graph, if all norms are in it."""
        made_of: dict[str, tuple[fx.Node, ...]] = {}  # a norm's input, or convolution and its input
        for node in graph.nodes:
            if node.target is run_block and isinstance(node.args[1], fx.Node):
                conv, norm, x = node.args[:3]
                made_of[str(norm.target)] = (x,) if conv is None else (conv, x)
            elif node.op == "call_module" and node.args:
                made_of[str(node.target)] = (node.args[0],)
        if not all(name in made_of for name in self.names):
            return
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            means = [
                graph.call_function(conv_means if len(parts) == 2 else channel_means, parts)
                for parts in map(made_of.__getitem__, self.names)
            ]
        output.args = ((output.args[0], *means),)
        self._graph = runnable(self.model, graph)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call a hook before each of the modules runs, inside the block."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
