"""Masks of attention heads that differ from sample to sample.

A head's mask is on columns of the output projection, which all samples share. Here the projection
is left out of the attention, the heads are multiplied by their rows of masks, and then projected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MaskedHeads


def names_of_heads(masked: nn.Module) -> set[str]:
    """Names of a wrapped model's layers whose neurons are heads."""
    return {name for name, module in masked.named_modules() if isinstance(module, MaskedHeads)}


def attention_of(model: nn.Module, name: str) -> nn.MultiheadAttention:
    """The attention whose output projection has this name."""
    attention = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(attention, nn.MultiheadAttention)
    return attention


@contextmanager
def masked_by_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give every sample masks of its own for the heads of attentions.

    Parameters
    ----------
    model
        A wrapped model.
    rows
        (N, heads) by the name of a projection, for the N samples that the model is going to run on.

    Yields
    ------
    dict of str to Tensor
        What the model's parameters have to be replaced by while it runs.
    """
    replaced, hooks = {}, []
    try:
        for name, row in rows.items():
            heads, attention = model.get_submodule(name), attention_of(model, name)
            assert isinstance(heads, MaskedHeads)
            project = partial(_project, row, heads.plain_weight, heads.bias)
            hooks.append(attention.register_forward_hook(project))
            replaced[f"{name}.mask"] = torch.ones_like(heads.mask)
            replaced[f"{name}.weight"] = torch.eye(heads.in_features).to(heads.plain_weight)
            if heads.bias is not None:
                replaced[f"{name}.bias"] = torch.zeros_like(heads.bias)
        yield replaced
    finally:
        for hook in hooks:
            hook.remove()


def _project(
    row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention: nn.MultiheadAttention,
    args: tuple[Any, ...],
    output: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """The attention's output, from that without a projection."""
    masks = row.repeat_interleave(attention.head_dim, 1)
    y = output[0] * (masks[:, None] if attention.batch_first else masks)
    return F.linear(y, weight, bias), output[1]
