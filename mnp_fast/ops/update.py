"""The fused mask step: gradient, weight penalty, momentum and clamp over all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from ._common import default_kernel


@torch.no_grad()
def mask_update_(
    masks: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    penalty: float = 0.0,
) -> None:
    """One step of projected SGD on ``loss(masks) + penalty * sum <mask, magnitude>``, in place.

    ``v = momentum * v + grad + penalty * magnitude; mask = clamp(mask - lr * v, 0, 1)``, which is
    `torch.optim.SGD` followed by a clamp.

    Parameters
    ----------
    masks, velocities
        One (K,) a layer, float32 or float64, contiguous; both are changed in place.
    grads, magnitudes
        Gradient of the loss and the neurons' magnitudes, shaped as the masks.
    lr, momentum, penalty
        Learning rate, momentum in [0, 1), and the weight of the penalty.

    Raises
    ------
    RuntimeError
        Lists of different lengths, or tensors of other shapes or dtypes than their mask.
    """
    masks, velocities = list(masks), list(velocities)
    arguments = (masks, list(grads), velocities, list(magnitudes), lr, momentum, penalty)
    backends.choose("mask_update_", *arguments).run(*arguments)
    for changed in (*masks, *velocities):
        torch.autograd.graph.increment_version(changed)


@torch.library.register_fake("mnp_fast::mask_update_")
def _fake(
    masks: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    magnitudes: list[Tensor],
    lr: float,
    momentum: float,
    penalty: float,
) -> None:
    return None


default_kernel("mask_update_")(reference.mask_update_)
backends.register_compiled("mask_update_", torch.ops.mnp_fast.mask_update_, reference.mask_update_)
