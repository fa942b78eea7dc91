"""Blocks that follow each other in a fused model, as one node of the autograd graph.

Autograd then sees one function where it saw a dozen, and the gradient of a value that several
blocks read is summed in the kernel that makes its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .layers import block_terms
from .ops._common import vector_grads, wants_grad
from .ops.conv import output_size

P = TypeVar("P")
_VECTORS = 4  # mask, scale, shift, bias


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
    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups."""
        conv = self.conv
        return conv.stride, conv.padding, conv.dilation, conv.groups


def can_run(steps: Sequence[Step], inputs: Sequence[Any]) -> bool:
    """Whether `run` computes what the blocks would compute one by one."""
    first = inputs[0]
    for x in inputs:
        plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dim() == 4
        if not plain or x.dtype != first.dtype or x.dtype not in (torch.float32, torch.float64):
            return False
    shapes = [tuple(x.shape) for x in inputs]
    for step in steps:
        weight = step.conv.weight
        if weight.dtype != first.dtype or weight.device.type != "cpu":
            return False
        shape = output_size(shapes[step.x], weight.shape, *step.geometry[:3])
        if step.residual is not None and shapes[step.residual] != shape:
            return False
        shapes.append(shape)
    return True


def run(
    steps: Sequence[Step], inputs: Sequence[Tensor], outputs: Sequence[int]
) -> tuple[Tensor, ...]:
    """Run the blocks.

    Parameters
    ----------
    steps
        The blocks, in an order in which they can run.
    inputs
        Images (N, C, H, W), CPU, float32 or float64.
    outputs
        Numbers of the values to return.
    """
    images = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    tensors: list[Tensor | None] = [*images]
    for step in steps:
        tensors += (step.conv.weight, *block_terms(step.conv, step.norm))
    if wants_grad(*tensors):
        apply: Callable[..., tuple[Tensor, ...]] = _Region.apply
        return apply(steps, outputs, len(images), *tensors)
    values: list[Tensor | None] = [*images]
    last = {number: i for i, step in enumerate(steps) for number in (step.x, step.residual)}
    for i, step in enumerate(steps):
        values.append(_forward(step, values, _own(tensors, len(images), i), False)[0])
        for number in (step.x, step.residual):
            if number is not None and last[number] == i and number not in outputs:
                values[number] = None
    return tuple(value for number in outputs if (value := values[number]) is not None)


def _own(parts: Sequence[P], inputs: int, step: int) -> Sequence[P]:
    """What belongs to a step's weight and vectors."""
    start = inputs + step * (1 + _VECTORS)
    return parts[start : start + 1 + _VECTORS]


def _forward(
    step: Step, values: Sequence[Tensor | None], own: Sequence[Tensor | None], keep_u: bool
) -> tuple[Tensor, Tensor]:
    residual = None if step.residual is None else values[step.residual]
    activation = "relu" if step.relu else "none"
    return torch.ops.mnp_fast.conv2d_forward(
        values[step.x], *own, residual, *step.geometry, activation, keep_u, _algorithm(step)
    )


def _algorithm(step: Step) -> str:
    return getattr(step.conv, "algorithm", step.algorithm)


class _Region(torch.autograd.Function):
    """Inputs are those of the region, then weight, mask, scale, shift and bias of every step."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[Step],
        outputs: Sequence[int],
        inputs: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        needed: tuple[bool, ...] = ctx.needs_input_grad[3:]
        values: list[Any] = list(tensors[:inputs])
        kept: list[Tensor | None] = []
        wanted = list(needed[:inputs])  # which values take gradients
        for i, step in enumerate(steps):
            own = _own(needed, inputs, i)
            keep_u = own[1] or own[2]
            y, u = _forward(step, values, _own(tensors, inputs, i), keep_u)
            values.append(y)
            kept.append(u if keep_u else None)
            through = wanted[step.x] or (step.residual is not None and wanted[step.residual])
            wanted.append(through or any(own))
        ctx.steps, ctx.outputs, ctx.inputs, ctx.wanted = steps, outputs, inputs, wanted
        ctx.set_materialize_grads(False)
        # Only what the backward reads: others may change the rest in place.
        read = {step.x for step in steps}
        made = (
            value if step.relu or inputs + i in read else None
            for i, (step, value) in enumerate(zip(steps, values[inputs:], strict=True))
        )
        ctx.save_for_backward(*tensors, *made, *kept)
        return tuple(values[number] for number in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        steps, inputs, wanted = ctx.steps, ctx.inputs, ctx.wanted
        saved = ctx.saved_tensors
        count = len(saved) - 2 * len(steps)
        tensors, kept = saved[:count], saved[count + len(steps) :]
        values = (*saved[:inputs], *saved[count : count + len(steps)])
        needed: tuple[bool, ...] = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * len(values)
        for number, grad in zip(ctx.outputs, given, strict=True):
            grads[number] = grad
        results: list[Tensor | None] = []
        for i in reversed(range(len(steps))):
            step, number = steps[i], inputs + i
            grad, grads[number] = grads[number], None
            if grad is None or not wanted[number]:
                results[:0] = [None] * (1 + _VECTORS)
                continue
            weight, mask, scale, shift, bias = _own(tensors, inputs, i)
            need_weight, *need_vectors = _own(needed, inputs, i)
            need_residual = step.residual is not None and wanted[step.residual]
            if need_residual and not step.relu:
                grads[step.residual] = _sum(grads[step.residual], grad)
            dx, dw, dz, sums = torch.ops.mnp_fast.conv2d_backward(
                grad,
                values[step.x],
                weight,
                values[number] if step.relu else None,
                kept[i],
                mask,
                scale,
                shift,
                *step.geometry,
                wanted[step.x],
                need_weight,
                need_residual and step.relu,
                any(need_vectors),
                _algorithm(step),
                grads[step.x] if wanted[step.x] else None,
            )
            if wanted[step.x]:
                grads[step.x] = dx
            if need_residual and step.relu:
                grads[step.residual] = _sum(grads[step.residual], dz)
            vectors: list[Tensor | None] = [None] * _VECTORS
            if any(need_vectors):
                vectors = vector_grads(sums, (mask, scale, shift, bias), tuple(need_vectors))
            results[:0] = [dw if need_weight else None, *vectors]
        return (None, None, None, *grads[:inputs], *results)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
