"""Channel means of batch norms' inputs, from a forward pass that may be fused.

In a fused network there is no such input: norms are part of their block. But what a convolution
gives on average it also gives for the average of what it reads, which is an output of the block
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fusion import FusedForward, block_graph, needs_own_forward, run_block, runnable

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
        self._convs: list[nn.Module | None] = []
        forward = vars(model).get("forward")
        if isinstance(forward, FusedForward):
            self._tap(block_graph(model, forward.algorithm))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of images (N, *), and the means (channels,) of all norms, one behind the other.

        Differentiable by the images.
        """
        if self._graph is None or needs_own_forward(self.model, list(self.model.modules())):
            return self._watched(images)
        logits, *inputs = self._graph(images)
        means = [
            channel_means(x if conv is None else conv(_mean_image(x)))
            for conv, x in zip(self._convs, inputs, strict=True)
        ]
        return logits, torch.cat(means)

    def _watched(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means: dict[nn.Module, Tensor] = {}
        with hooked(self.norms, lambda norm, x: means.update({norm: channel_means(x[0])})):
            logits = self.model(images)
        return logits, torch.cat([means[norm] for norm in self.norms])

    def _tap(self, graph: fx.Graph) -> None:
        """Make what the norms' blocks read outputs of the graph, if all norms are in it."""
        read: dict[str, tuple[nn.Module | None, fx.Node]] = {}
        for node in graph.nodes:
            if node.target is run_block and isinstance(node.args[1], fx.Node):
                conv, norm, x = node.args[:3]
                module = None if conv is None else self.model.get_submodule(str(conv.target))
                read[str(norm.target)] = module, x
            elif node.op == "call_module" and node.args:
                read[str(node.target)] = None, node.args[0]
        if not all(name in read for name in self.names):
            return
        self._convs = [read[name][0] for name in self.names]
        (output,) = graph.find_nodes(op="output")
        output.args = ((output.args[0], *(read[name][1] for name in self.names)),)
        self._graph = runnable(self.model, graph)


def channel_means(x: Tensor) -> Tensor:
    """Means (C,) over all but the channels of (N, C, *)."""
    return x.mean([0, *range(2, x.dim())])


def _mean_image(x: Tensor) -> Tensor:
    """The mean (1, C, H, W) over images (N, C, H, W); fast where these are channels-last."""
    return x.movedim(1, -1).mean(0, keepdim=True).movedim(-1, 1)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call a hook before each of the modules runs, inside the block."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
