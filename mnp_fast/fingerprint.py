"""What tells two runs apart, so that a checkpoint is used by the run it belongs to alone."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .data import CleanSet


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state without what modules add to it that is no tensor (`get_extra_state`)."""
    state = model.state_dict().items()
    return {name: value.detach() for name, value in state if isinstance(value, torch.Tensor)}


def fingerprint(model: nn.Module, data: CleanSet, settings: dict[str, Any]) -> str:
    """Of all that a run's outcome depends on; the settings are plain data."""
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    facts = [metadata.version("mnp_fast"), settings, modules]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    tensors = {**tensors_of(model), "images": data.images, "labels": data.labels}
    for name, tensor in tensors.items():
        flat = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.numpy().data)
    return digest.hexdigest()
