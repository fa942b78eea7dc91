"""Blocks that follow each other in a fused model, as one operator and one node of autograd.

Python then does nothing between them, and the gradient of a value that several blocks read is
summed in the kernel that makes its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import MaskedConv2d, MaskedLayer
from .ops._common import call, second_derivative_error, wants_grad
from .ops.conv import output_size

_output_size = lru_cache(4096)(output_size)


class Step(NamedTuple):
    """A block ``relu(norm(conv(x)) + residual)`` on numbered values.

    Values are numbered from 0: a region's inputs, then what its steps compute, in order.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    x: int
    residual: int | None
    relu: bool
    algorithm: str  # for a convolution without one of its own

    @property
    def geometry(self) -> Any:
        """Stride, padding and dilation, for height and width."""
        return self.conv.stride, self.conv.padding, self.conv.dilation


class Region:
    """The blocks of a region.

    Parameters
    ----------
    steps
        The blocks, in an order in which they can run.
    outputs
        Numbers of the values to return.
    means
        Numbers of the steps whose convolutions' means over samples and pixels to return as well.
    """

    def __init__(
        self, steps: Sequence[Step], outputs: Sequence[int], means: Sequence[int] = ()
    ) -> None:
        self.steps, self.outputs, self.means = steps, outputs, means

    def plan(self, inputs: Sequence[Any]) -> Plan | None:
        """How to run on these inputs; None where the operator computes something else."""
        first = inputs[0]
        for x in inputs:
            plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dim() == 4
            if not plain or x.dtype != first.dtype or x.dtype not in (torch.float32, torch.float64):
                return None
        values = len(inputs) + len(self.steps)
        plan = Plan([*self.outputs, *(values + step for step in self.means)])
        shapes = [tuple(x.shape) for x in inputs]
        for step in self.steps:
            weight = plan.add(step)
            shape = _output_size(shapes[step.x], weight.shape, *step.geometry)
            if step.residual is not None and shapes[step.residual] != shape:
                return None
            shapes.append(shape)
        return None if wants_grad(*plan.statistics) else plan


class Plan:
    """Blocks as the operators take them; csrc/ops/ops.h says how."""

    def __init__(self, outputs: Sequence[int]) -> None:
        self.outputs = outputs
        self.parts: list[Tensor] = []
        self.numbers: list[int] = []
        self.eps: list[float] = []
        self.algorithms: list[str] = []
        self.statistics: list[Tensor | None] = []  # of the norms
        self.weights: list[tuple[int, int]] = []  # the values that they meet, and places in parts

    def add(self, step: Step) -> Tensor:
        """Add a block; returns the weight of its convolution."""
        conv, norm = step.conv, step.norm
        masked = norm if isinstance(norm, MaskedLayer) else conv
        weight = _parameter(conv, "weight")
        self.weights.append((step.x, len(self.parts)))
        self.parts += weight, _parameter(masked, "mask")
        vectors = [_parameter(conv, "bias")]
        if norm is not None:
            mean, var = norm.running_mean, norm.running_var
            self.statistics += mean, var
            vectors += _parameter(norm, "weight"), _parameter(norm, "bias"), mean, var
        given = 0
        for i, vector in enumerate(vectors):
            if vector is not None:
                given |= 1 << i
                self.parts.append(vector)
        residual = -1 if step.residual is None else step.residual
        self.numbers += step.x, residual, step.relu, *chain(*step.geometry), conv.groups
        self.numbers += given, _masked_addends(masked)
        self.eps.append(0.0 if norm is None else norm.eps)
        chosen = conv.algorithm if isinstance(conv, MaskedConv2d) else step.algorithm
        self.algorithms.append(chosen)
        return weight

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, from images (N, C, H, W)."""
        images = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        tensors = *images, *self.parts
        if wants_grad(*tensors):
            apply: Callable[..., tuple[Tensor, ...]] = _Region.apply
            return apply(self, len(images), *tensors)
        return tuple(self.forward(images, self.parts, [False] * len(tensors)))

    def inputs_read(self, needed: Sequence[bool], inputs: int) -> list[int]:
        """Inputs that the gradient of a weight reads, in their order."""
        return sorted({x for x, part in self.weights if x < inputs and needed[inputs + part]})

    def forward(
        self, images: Sequence[Tensor], parts: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """The outputs, then what `backward` needs."""
        operator = torch.ops.mnp_fast.region_forward.default
        plan = self.numbers, self.eps, self.algorithms, self.outputs
        made: list[Tensor] = call(operator, images, parts, *plan, needed)
        return made

    def backward(
        self,
        grads: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        parts: Sequence[Tensor],
        needed: Sequence[bool],
        sizes: Sequence[int],
    ) -> list[Tensor | None]:
        """Gradients of images and parts."""
        operator = torch.ops.mnp_fast.region_backward.default
        plan = self.numbers, self.eps, self.algorithms, self.outputs
        made: list[Tensor | None] = call(operator, grads, kept, parts, *plan, needed, sizes)
        return made


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter, by the short way where the module has it as such."""
    table = module._parameters
    return table[name] if name in table else getattr(module, name)


def _masked_addends(masked: nn.Module) -> int:
    """A bit each for whether the mask multiplies the convolution's bias, the mean, the norm's bias.

    As `mnp_fast.layers.block_terms` has it.
    """
    if isinstance(masked, nn.Conv2d):
        return 0b001 if masked.site == "neuron" else 0b000
    return 0b011 if masked.site == "norm" else 0b111


class _Region(torch.autograd.Function):
    """Its tensors are the region's images, then the parts of the plan."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[2:]
        images, parts = tensors[:inputs], tensors[inputs:]
        made = plan.forward(images, parts, needed)
        outputs = len(plan.outputs)
        kept = *(images[i] for i in plan.inputs_read(needed, inputs)), *made[outputs:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *parts)
        ctx.plan, ctx.kept = plan, len(kept)
        ctx.sizes = [size for image in images for size in image.shape]
        return tuple(made[:outputs])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        kept, parts = saved[: ctx.kept], saved[ctx.kept :]
        with torch.no_grad():
            made = ctx.plan.backward(given, kept, parts, ctx.needs_input_grad[2:], ctx.sizes)
        grads = None, None, *made
        if not torch.is_grad_enabled():
            return grads
        apply: Callable[..., tuple[Tensor | None, ...]] = _Once.apply
        return apply(len(grads), *grads, *given, *saved)


class _Once(torch.autograd.Function):
    """The first `count` of its tensors, which depend on the others in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise second_derivative_error("a fused model")
