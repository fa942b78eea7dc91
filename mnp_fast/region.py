"""Blocks that follow each other in a fused model, as one node of the autograd graph.

Autograd then sees one function where it saw a dozen, and the gradient of a value that several
blocks read is summed in the kernel that makes its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .layers import block_terms
from .ops._common import second_derivative_error, vector_grads, wants_grad
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
    for i, (step, done) in enumerate(zip(steps, _last_reads(steps, outputs), strict=True)):
        values.append(_forward(step, values, _own(tensors, len(images), i), False, False)[0])
        for number in done:
            values[number] = None
    return tuple(value for number in outputs if (value := values[number]) is not None)


def _last_reads(steps: Sequence[Step], kept: Collection[int]) -> list[set[int]]:
    """For every step, the values that are not read after it; without those that are kept."""
    last: list[set[int]] = []
    read = set(kept)
    for step in reversed(steps):
        ours = {number for number in (step.x, step.residual) if number is not None}
        last.append(ours - read)
        read |= ours
    return last[::-1]


def _own(parts: Sequence[P], inputs: int, step: int) -> Sequence[P]:
    """What belongs to a step's weight and vectors."""
    start = inputs + step * (1 + _VECTORS)
    return parts[start : start + 1 + _VECTORS]


def _forward(
    step: Step,
    values: Sequence[Tensor | None],
    own: Sequence[Tensor | None],
    keep_u: bool,
    keep_active: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mnp_fast.conv2d_forward(
        values[step.x],
        *own,
        None if step.residual is None else values[step.residual],
        *step.geometry,
        "relu" if step.relu else "none",
        keep_u,
        keep_active,
        _algorithm(step),
    )


def _algorithm(step: Step) -> str:
    return getattr(step.conv, "algorithm", step.algorithm)


class _Region(torch.autograd.Function):
    """Inputs are those of the region, then weight, mask, scale, shift and bias of every step.

    Images are kept only for gradients of weights: where those are frozen, a ReLU's activity, a
    byte an element, is all that the backward needs of them.
    """

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
        sizes = [value.shape for value in values]
        wanted = list(needed[:inputs])  # which values take gradients
        weighted = (step.x for i, step in enumerate(steps) if _own(needed, inputs, i)[0])
        read = set(weighted)  # by gradients of weights
        last = _last_reads(steps, read.union(outputs))
        kept_u: list[Tensor | None] = []
        kept_active: list[Tensor | None] = []
        for i, step in enumerate(steps):
            own, number = _own(needed, inputs, i), inputs + i
            through = wanted[step.x] or (step.residual is not None and wanted[step.residual])
            wanted.append(through or any(own))
            keep_u = own[1] or own[2]
            keep_active = step.relu and wanted[number] and number not in read
            y, u, active = _forward(step, values, _own(tensors, inputs, i), keep_u, keep_active)
            values.append(y)
            sizes.append(y.shape)
            kept_u.append(u if keep_u else None)
            kept_active.append(active if keep_active else None)
            for number in last[i]:
                values[number] = None
        ctx.steps, ctx.outputs, ctx.inputs = steps, outputs, inputs
        ctx.wanted, ctx.sizes = wanted, sizes
        ctx.set_materialize_grads(False)
        kept = (values[number] if number in read else None for number in range(len(values)))
        ctx.save_for_backward(*kept, *kept_u, *kept_active, *tensors[inputs:])
        return tuple(values[number] for number in outputs)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Region._gradients(ctx, *given)
        if not torch.is_grad_enabled():
            return grads
        apply: Callable[..., tuple[Tensor | None, ...]] = _Once.apply
        return apply(len(grads), *grads, *given, *ctx.saved_tensors)

    @staticmethod
    def _gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        steps, inputs, wanted, sizes = ctx.steps, ctx.inputs, ctx.wanted, ctx.sizes
        saved, count = ctx.saved_tensors, len(steps)
        values, rest = saved[: inputs + count], saved[inputs + count :]
        kept_u, kept_active, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
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
            weight, mask, scale, shift, bias = _own(tensors, 0, i)
            need_weight, *need_vectors = _own(needed, inputs, i)
            need_residual = step.residual is not None and wanted[step.residual]
            if need_residual and not step.relu:
                grads[step.residual] = _sum(grads[step.residual], grad)
            dx, dw, dz, sums = torch.ops.mnp_fast.conv2d_backward(
                grad,
                values[step.x] if need_weight else None,
                sizes[step.x],
                weight,
                values[number] if step.relu else None,
                kept_active[i],
                kept_u[i],
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


class _Once(torch.autograd.Function):
    """The first `count` of its tensors, which depend on the others in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise second_derivative_error("a fused model")


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
