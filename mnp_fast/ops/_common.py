"""What the operators share: registration, dtypes, and the gradients of per-neuron vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("mnp_fast", "IMPL")  # registrations live as long as this does


def default_kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a plain-PyTorch kernel for the devices that have no compiled one."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        return kernel

    return register


def second_derivative_error(name: str) -> NotImplementedError:
    """What to raise where `name` is differentiated twice outside of a transform."""
    return NotImplementedError(
        f"{name} cannot be differentiated a second time: its gradient is computed by a kernel. "
        "Inside transforms such as torch.func.grad or torch.func.hessian masked layers run torch's "
        "operators, which can be; so can those of mnp_fast.reference"
    )


def no_double_backward(name: str) -> None:
    """Make differentiating the backward operator `name` an error instead of a wrong result."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise second_derivative_error(f"mnp_fast::{name}")

    torch.library.register_autograd(f"mnp_fast::{name}", backward)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute and accumulate in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels-last in memory.

    With one channel or one pixel it is contiguous as well. Then it is as torch has it, who goes by
    strides that matter to no element.
    """
    if x.dim() not in (4, 5):
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if not x.is_contiguous(memory_format=last):
        return False
    if not x.is_contiguous():
        return True
    return x.stride(1) == 1 and x.stride(-1) == x.shape[1] and x.numel() > x.shape[0]


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a 4-D tensor: channels-last or contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def empty_like_layout(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """An empty 4-D tensor in the dtype, device and memory format of x."""
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def wants_grad(*arguments: Any) -> bool:
    """Whether autograd will ask for the gradient of any of the tensors among the arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
    )


def call(operator: Callable[..., Any], *arguments: Any) -> Any:
    """An operator of this library, past autograd's formula where no gradient is asked for.

    The formula is in Python and takes as long as a small layer.
    """
    if torch.compiler.is_compiling() or wants_grad(*arguments):
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def in_transform() -> bool:
    """Whether a transform of `torch.func` is at work: they see through torch's operators alone."""
    return torch._C._are_functorch_transforms_active()


def autocast(t: Tensor) -> Tensor:
    """A tensor in the dtype in which autocast, if it is enabled, has convolutions computed."""
    if not torch._C._is_any_autocast_enabled():
        return t
    device = t.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return t
    return t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(device))


def vector_grads(
    sums: Tensor, vectors: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of mask, scale, shift and bias from the backward's per-sample sums.

    Parameters
    ----------
    sums
        (3, N, K): dz, dz * t and dz * u, each summed over a sample's pixels.
    vectors
        mask, (K,) or (N, K), and scale, shift, bias, (K,); None where not given.
    needed
        Which of the four gradients are wanted.
    """
    mask = vectors[0]
    dz, dz_t, dz_u = sums.unbind(0)

    def masked(sum_: Tensor) -> Tensor:
        return (sum_ if mask is None else sum_ * mask.to(sum_.dtype)).sum(0)

    formulas: list[Callable[[], Tensor]] = [
        lambda: dz_t if mask is not None and mask.dim() == 2 else dz_t.sum(0),
        lambda: masked(dz_u),
        lambda: masked(dz),
        lambda: dz.sum(0),
    ]
    return [
        formula().to(vector.dtype) if vector is not None and wanted else None
        for formula, vector, wanted in zip(formulas, vectors, needed, strict=True)
    ]
