"""The operators in plain PyTorch: their definition, the oracle of the tests, and the kernels of
devices that have none of their own.

Every fused operator computes, per output neuron k::

    t = scale * u + shift            u: what the neuron computes
    y = act(mask * t + bias + residual)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def per_neuron(vector: Tensor, dim: int) -> Tensor:
    """View a vector (K,) or (N, K) so that it broadcasts over ``(N, K, *)`` of `dim` dimensions."""
    return vector.reshape(*vector.shape, *(1,) * (dim - 2))


def epilogue(
    u: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(mask * (scale * u + shift) + bias + residual)`` for u of shape ``(N, K, *)``."""
    y = u
    if scale is not None:
        y = y * per_neuron(scale, u.dim())
    if shift is not None:
        y = y + per_neuron(shift, u.dim())
    if mask is not None:
        y = y * per_neuron(mask, u.dim())
    if bias is not None:
        y = y + per_neuron(bias, u.dim())
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def epilogue_backward(
    grad: Tensor,
    y: Tensor | None,
    u: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the epilogue.

    Returns
    -------
    dz, g, sums
        dz of z, the activation's argument; g of u; and (3, N, K) sums over the
        pixels of dz, dz * t and dz * u (0 where u is not given), from which the per-neuron
        gradients follow.
    """
    dz = grad if y is None else torch.where(y <= 0, torch.zeros_like(grad), grad)
    g = epilogue(epilogue(dz, mask=mask), scale=scale)
    pixels = dz.flatten(2) if dz.dim() > 2 else dz.unsqueeze(2)
    if u is None:
        zero = torch.zeros_like(pixels[..., 0])
        return dz, g, torch.stack([pixels.sum(2), zero, zero])
    t = epilogue(u, scale=scale, shift=shift).reshape(pixels.shape)
    return dz, g, torch.stack([(pixels * v).sum(2) for v in (1, t, u.reshape(pixels.shape))])


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """The epilogue of ``conv2d(x, weight)``."""
    u = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return epilogue(u, mask, scale, shift, bias, residual, activation)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The epilogue of ``x @ weight.T``, for x of shape ``(N, *, C)``; neurons come last."""
    u = F.linear(x, weight).movedim(-1, 1)
    moved = None if residual is None else residual.movedim(-1, 1)
    return epilogue(u, mask, scale, shift, bias, moved, activation).movedim(1, -1)


def masked_affine(
    x: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The epilogue of x itself, of shape ``(N, K, *)``."""
    return epilogue(x, mask, scale, shift, bias, residual, activation)


def neuron_magnitude(weights: Sequence[Tensor], norm: str = "l1") -> list[Tensor]:
    """The norm of each neuron's weights: w of shape ``(K, *)`` gives (K,).

    `"spectral"` is the largest singular value of a neuron's weights as a matrix ``(C, *)``.
    """
    if norm == "spectral":
        matrices = [w.reshape(len(w), *w.shape[1:2], -1) for w in weights]
        return [torch.linalg.matrix_norm(m if m.dim() == 3 else m[..., None], 2) for m in matrices]
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[norm]
    return [torch.linalg.vector_norm(w.flatten(1), order, dim=1) for w in weights]


def mask_update_(
    masks: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    lr: float,
    momentum: float,
    penalty: float,
) -> None:
    """One SGD step with momentum on ``loss + penalty * <mask, magnitude>``, clamped to [0, 1]."""
    for mask, grad, velocity, magnitude in zip(masks, grads, velocities, magnitudes, strict=True):
        velocity.mul_(momentum).add_(grad).add_(magnitude, alpha=penalty)
        mask.sub_(velocity, alpha=lr).clamp_(0, 1)
