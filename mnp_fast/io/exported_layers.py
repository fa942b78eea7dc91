"""Layers of an exported graph as modules: what a functional call computes, with its own tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TENSORS = ("weight", "bias", "running_mean", "running_var")
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def make_layer(
    name: str, tensors: dict[str, Tensor], options: dict[str, Any], *, rank: int
) -> nn.Module | None:
    """The module for a call of `conv2d`, `linear` or `batch_norm`; None where there is none.

    Parameters
    ----------
    name
        The operator.
    tensors
        Those of `TENSORS` that the call was given.
    options
        The call's other arguments, by name; absent ones have the operator's defaults.
    rank
        Number of dimensions of the call's input.

    Returns
    -------
    nn.Module or None
        A module that holds `tensors` themselves, not copies.
    """
    makers = {"conv2d": _conv, "linear": _linear, "batch_norm": _norm}
    module = makers[name](tensors, options, rank) if name in makers else None
    if module is not None:
        for key, tensor in tensors.items():
            setattr(module, key, tensor)
    return module


def _conv(tensors: dict[str, Tensor], options: dict[str, Any], rank: int) -> nn.Module | None:
    weight = tensors.get("weight")
    if not isinstance(weight, nn.Parameter) or weight.ndim != 4 or rank != 4:
        return None
    groups = options.get("groups", 1)
    padding = options.get("padding", 0)
    return nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=_pair(options.get("stride", 1)),
        padding=padding if isinstance(padding, str) else _pair(padding),
        dilation=_pair(options.get("dilation", 1)),
        groups=groups,
        bias="bias" in tensors,
        device="meta",
    )


def _linear(tensors: dict[str, Tensor], options: dict[str, Any], rank: int) -> nn.Module | None:
    weight = tensors.get("weight")
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")


def _norm(tensors: dict[str, Tensor], options: dict[str, Any], rank: int) -> nn.Module | None:
    mean = tensors.get("running_mean")
    # nn.BatchNorm has both of weight and bias or neither.
    if mean is None or rank not in NORMS or ("weight" in tensors) != ("bias" in tensors):
        return None
    module: nn.Module = NORMS[rank](
        mean.numel(),
        eps=options["eps"],
        momentum=options["momentum"],
        affine="weight" in tensors,
        device="meta",
    )
    module.num_batches_tracked = torch.tensor(0)
    return module


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, list) else [value]
    return first, rest[0] if rest else first
