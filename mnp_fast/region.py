"""Blocks that follow each other in a fused model, as one operator and one node of autograd.

Python then does nothing between them, and the gradient of a value that several blocks read is
summed in the kernel that makes its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain, compress
from operator import attrgetter, is_
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

    @property
    def masked(self) -> nn.Module:
        """What has the mask."""
        return self.norm if isinstance(self.norm, MaskedLayer) else self.conv

    def tables(self) -> list[tuple[dict[str, Any], str]]:
        """Where the tensors of a plan are, by table and name."""
        conv: dict[str, Any] = self.conv._parameters
        places = [(conv, "weight"), (conv, "bias"), (self.masked._parameters, "mask")]
        if self.norm is not None:
            of_norm, statistics = self.norm._parameters, self.norm._buffers
            places += (of_norm, "weight"), (of_norm, "bias")
            places += (statistics, "running_mean"), (statistics, "running_var")
        return places

    def settings(self) -> list[tuple[Callable[[nn.Module], Any], nn.Module]]:
        """What else a plan says: readers, and what they read it from."""
        geometry = attrgetter("__class__", "stride", "padding", "dilation", "groups")
        read: list[tuple[Callable[[nn.Module], Any], nn.Module]] = [(geometry, self.conv)]
        if isinstance(self.conv, MaskedConv2d):
            read.append((attrgetter("algorithm", "site"), self.conv))
        if self.norm is not None:
            read.append((attrgetter("__class__", "eps"), self.norm))
        if isinstance(self.norm, MaskedLayer):
            read.append((attrgetter("site"), self.norm))
        return read


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
        self._tables = [place for step in steps for place in step.tables()]
        self._settings = [setting for step in steps for setting in step.settings()]
        self._made: tuple[list[Any], list[Any], Plan | None] | None = None

    def plan(self, inputs: Sequence[Any]) -> Plan | None:
        """How to run on these inputs; None where the operator computes something else."""
        first = inputs[0]
        for x in inputs:
            plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dim() == 4
            if not plain or x.dtype != first.dtype or x.dtype not in (torch.float32, torch.float64):
                return None
        shapes = [tuple(x.shape) for x in inputs]
        settings = [*shapes, *(read(module) for read, module in self._settings)]
        tensors = [table.get(name) for table, name in self._tables]
        made = self._made
        if made is not None and settings == made[0] and all(map(is_, tensors, made[1])):
            plan = made[2]
        else:
            plan = self._make(shapes)
            # What a module computes anew in each call is not in its tables.
            known = all(name in table for table, name in self._tables)
            self._made = (settings, tensors, plan) if known else None
        return None if plan is None or wants_grad(*plan.statistics) else plan

    def _make(self, shapes: list[tuple[int, ...]]) -> Plan | None:
        values = len(shapes) + len(self.steps)
        plan = Plan([*self.outputs, *(values + step for step in self.means)])
        for step in self.steps:
            weight = plan.add(step)
            shape = _output_size(shapes[step.x], weight.shape, *step.geometry)
            if step.residual is not None and shapes[step.residual] != shape:
                return None
            shapes.append(shape)
        return plan


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
        masked = step.masked
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
        watched = torch.is_grad_enabled()
        needed = [watched and tensor.requires_grad for tensor in (*images, *self.parts)]
        if not any(needed):
            return tuple(self.forward(images, needed))
        apply: Callable[..., tuple[Tensor, ...]] = _Region.apply
        return apply(self, needed, *images, *compress(self.parts, needed[len(images) :]))

    def inputs_read(self, needed: Sequence[bool], inputs: int) -> list[int]:
        """Inputs that the gradient of a weight reads, in their order."""
        return sorted({x for x, part in self.weights if x < inputs and needed[inputs + part]})

    def forward(self, images: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        """The outputs, then what `backward` needs."""
        operator = torch.ops.mnp_fast.region_forward.default
        made: list[Tensor] = call(operator, images, *self._blocks(), needed)
        return made

    def backward(
        self,
        grads: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        needed: Sequence[bool],
        sizes: Sequence[int],
    ) -> list[Tensor | None]:
        """Gradients of images and parts."""
        operator = torch.ops.mnp_fast.region_backward.default
        made: list[Tensor | None] = call(operator, grads, kept, *self._blocks(), needed, sizes)
        return made

    def _blocks(self) -> tuple[Any, ...]:
        return self.parts, self.numbers, self.eps, self.algorithms, self.outputs


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
    """Its tensors are the region's images, then those parts of the plan that take gradients.

    Autograd would spend more time on the other parts than some blocks take.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, needed: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = len(needed) - len(plan.parts)
        images, wanted = tensors[:inputs], tensors[inputs:]
        made = plan.forward(images, needed)
        outputs = len(plan.outputs)
        kept = *(images[i] for i in plan.inputs_read(needed, inputs)), *made[outputs:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *wanted)
        ctx.plan, ctx.needed, ctx.inputs, ctx.kept = plan, needed, inputs, len(kept)
        ctx.versions = [part._version for part in plan.parts]
        ctx.sizes = [size for image in images for size in image.shape]
        return tuple(made[:outputs])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, plan = ctx.saved_tensors, ctx.plan
        for part, version in zip(plan.parts, ctx.versions, strict=True):
            if part._version != version:
                raise RuntimeError(
                    f"a tensor {tuple(part.shape)} of a fused model was changed in place between "
                    "its forward and backward, which needs it as it was"
                )
        with torch.no_grad():
            made = plan.backward(given, saved[: ctx.kept], ctx.needed, ctx.sizes)
        of_parts = compress(made[ctx.inputs :], ctx.needed[ctx.inputs :])
        grads = None, None, *made[: ctx.inputs], *of_parts
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
