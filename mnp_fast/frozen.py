"""Weights that stay as they are for a while are packed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ._extension import _C


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Keep a model's weights packed while the block runs, instead of packing them in each call.

    These are the weights of 2-d convolutions and of linear layers.

    Before each call of the model, versions and addresses of its weights are compared: one that was
    changed in place, loaded, moved or replaced is packed anew. Masks, norms and biases may change
    as ever. What is kept counts against a limit as large as `memory_budget`; weights beyond it are
    packed in every call.

    Not noticed, and not to be done in the block: changes behind autograd's back (`weight.data`, a
    NumPy view), in inference mode, before a call of a part of the model alone, and of a model that
    runs under `torch.compile`.

    Parameters
    ----------
    model
        A wrapped model; weights on other devices than the CPU are left alone.
    """
    kept = [
        _Kept(layer)
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer._parameters.get("weight") is not None
    ]

    def refresh(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            for one in kept:
                one.refresh()

    with ExitStack() as stack:
        for one in kept:
            stack.callback(one.thaw)
        stack.enter_context(model.register_forward_pre_hook(refresh))
        yield


class _Kept:
    """A layer's weight as it was when it was packed."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        self.layer = layer
        self.freeze()

    def freeze(self) -> None:
        self.weight = self.layer.weight
        self.memory = self.weight.detach()  # which nobody else can get while it is kept
        self.address = self.memory.data_ptr()
        # Tensors of inference mode have no version.
        self.version = None if self.weight.is_inference() else self.weight._version
        if self.memory.device.type == "cpu":
            _C.freeze_weights(self.address)

    def thaw(self) -> None:
        if self.memory.device.type == "cpu":
            _C.thaw_weights(self.address)

    def refresh(self) -> None:
        weight = self.weight
        if (
            self.layer._parameters.get("weight") is weight
            and weight.data_ptr() == self.address
            and (self.version is None or weight._version == self.version)
        ):
            return
        if self.memory.device.type == "cpu":
            _C.forget_weights(self.address)
        self.thaw()
        self.freeze()
