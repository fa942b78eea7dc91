"""Channels and heads that masks have silenced, removed: `compact`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from .attention import parameter, remove_heads
from .channels import ChannelFlow, Layer, Norm, channel_flow, grouped_weight, is_transposed
from .wrap import masked_layers, unwrap

# A constant that carries larger ones is not smaller than this share of them.
_CARRIER = 1 / 8


def compact(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """A smaller plain model with the same outputs: constant channels and silent heads are gone.

    A channel is constant where its mask is 0, or its weights are. It is removed with all that
    computes it and all that reads it, if every channel that is added to it, or is otherwise of the
    same fate, can go too. What it leaves goes into the biases of the layers that read it. Where
    such a layer pads with zeros, the constant ends at the border; one of the layer's constant
    channels then stays and carries the others in its weights. A channel whose readers all have
    weights 0 for it is removed as well.

    Followed are convolutions, transposed ones too, linear layers, batch norms (also those of timm
    with an activation behind them), element-wise functions, additions and products, concatenation,
    equal chunks, slices (what is in front of their ends stays), pooling, padding, means and sums,
    `flatten`, `permute`. Channels that anything else reads or makes stay, with what masks have left
    of them, and so do those of modules that are called more than once. Nothing is removed of inputs
    and outputs. A layer that has no neurons left keeps one.

    A head of `torch.nn.MultiheadAttention` is silent where its columns of the output projection are
    0. The attention then becomes a `mnp_fast.attention.PrunedAttention`, unless the model reads
    what that cannot give, such as the weights of attention, or the attention has hooks, `bias_k`
    or `add_zero_attn`. Attention written in any other way keeps its heads. A model that cannot be
    traced symbolically loses heads alone.

    Parameters
    ----------
    model
        A wrapped model, or a plain one, for instance of `unwrap` or `defend`; it is not changed.
    example_inputs
        Inputs to run the model on: for their shapes, and to compare the outputs.

    Returns
    -------
    nn.Module
        A model of the same class in eval mode, made of torch's own layers, some with fewer
        channels, and of `PrunedAttention`. Parameters that were shared between layers may no longer
        be.

    Raises
    ------
    TypeError
        `model` is not a module, or `example_inputs` not a tuple.
    ValueError
        The model cannot be traced symbolically and no head of it can go, or `example_inputs` hold
        no samples.
    RuntimeError
        The outputs are not equal, within 1.2e-5 of the largest in float32: the model does
        something that its trace does not show.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs must be a tuple, not {type(example_inputs).__name__}")
    if any(isinstance(value, Tensor) and value.numel() == 0 for value in example_inputs):
        raise ValueError("example_inputs must hold at least one sample")
    small = (unwrap(model) if masked_layers(model) else copy.deepcopy(model)).eval()
    with torch.no_grad():
        expected = _outputs(copy.deepcopy(model).eval(), example_inputs)
        heads_removed = remove_heads(small, example_inputs)
        try:
            flow = channel_flow(small, example_inputs)
        except ValueError:
            if not heads_removed:
                raise
        else:
            _shrink(flow)
        _compare(_outputs(small, example_inputs), expected, type(model).__name__)
    return small


def _shrink(flow: ChannelFlow) -> None:
    """Take channels out of all layers and norms, in place."""
    kept = _kept(flow)
    for layer in flow.layers:
        _shrink_layer(layer, kept)
    for norm, channels in flow.norms:
        _shrink_norm(norm, kept[channels])


def _kept(flow: ChannelFlow) -> Tensor:
    """Which sets of channels stay: as few as all rules allow."""
    kept = flow.kept.clone()
    rules: tuple[Callable[[Layer, Tensor], None], ...]
    rules = _keep_what_is_read, _keep_carriers, _keep_equal_groups, _keep_one
    index = 0
    while index < len(rules):
        before = int(kept.sum())
        # What a layer reads depends on what stays behind it: backwards is the short way.
        for layer in reversed(flow.layers):
            rules[index](layer, kept)
        index = index + 1 if int(kept.sum()) == before else 0
    return kept


def _read(layer: Layer, kept: Tensor) -> Tensor:
    """(groups, channels of a group) whether neurons that stay have weights for a channel."""
    return (layer.uses & kept[layer.outputs][:, :, None]).any(1)


def _keep_what_is_read(layer: Layer, kept: Tensor) -> None:
    """What varies and is read by neurons that stay."""
    kept[layer.inputs[_read(layer, kept) & layer.constant.isnan()]] = True


def _keep_carriers(layer: Layer, kept: Tensor) -> None:
    """Where a layer has a border, one constant that is large enough to stand for those removed."""
    if not layer.has_border:
        return
    stays, sizes = kept[layer.inputs], layer.constant.abs().nan_to_num()
    removed = torch.where(_read(layer, kept) & ~stays, sizes, 0)
    needed, best = removed.max(1)
    missing = torch.where(stays, sizes, 0).amax(1) < needed * _CARRIER
    kept[layer.inputs[missing, best[missing]]] = True


def _keep_equal_groups(layer: Layer, kept: Tensor) -> None:
    """Groups go as a whole; the others have as many channels and as many neurons as each other."""
    if len(layer.inputs) == 1:
        return
    stays = kept[layer.inputs].any(1) | kept[layer.outputs].any(1)
    for side in (layer.inputs, layer.outputs):
        count = max(1, int(kept[side].sum(1).max()))
        first = (~kept[side]).int().argsort(dim=1, stable=True)[:, :count]
        kept[side.gather(1, first)[stays]] = True


def _keep_one(layer: Layer, kept: Tensor) -> None:
    """One neuron of a layer that would have none."""
    if not kept[layer.outputs].any():
        kept[layer.outputs[0, 0]] = True


def _shrink_layer(layer: Layer, kept: Tensor) -> None:
    """Take channels and neurons out of a layer, in place, and put constants into what is left."""
    module, inputs, outputs = layer.module, kept[layer.inputs], kept[layer.outputs]
    if inputs.all() and outputs.all():
        return
    weight, constant = grouped_weight(module), layer.constant.nan_to_num()
    left = torch.einsum("goik,gi->gok", weight, constant.masked_fill(inputs, 0))
    bias = torch.zeros(outputs.shape, dtype=weight.dtype)
    if module.bias is not None:
        bias += module.bias.detach().cpu().reshape(outputs.shape)
    if layer.has_border:
        carried, carrier = constant.masked_fill(~inputs, 0).abs().max(1)
        groups = carried.nonzero().flatten()
        carrier = carrier[groups]
        weight[groups, :, carrier] += left[groups] / constant[groups, carrier][:, None, None]
    else:
        bias += left.sum(2)
    stay = outputs.any(1)
    parts = [w[o][:, i] for w, o, i in zip(weight[stay], outputs[stay], inputs[stay], strict=True)]
    weight = torch.cat([w.transpose(0, 1) if is_transposed(module) else w for w in parts])
    weight = weight.reshape(*weight.shape[:2], *module.weight.shape[2:])
    bias = bias[outputs]
    if module.bias is not None or bias.any():
        like = module.weight if module.bias is None else module.bias
        module.bias = parameter(bias, like)
    module.weight = parameter(weight, module.weight)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.groups = int(stay.sum())
        module.in_channels, module.out_channels = int(inputs.sum()), int(outputs.sum())


def _shrink_norm(norm: Norm, kept: Tensor) -> None:
    """Take channels out of a batch norm, in place."""
    if kept.all():
        return
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            old = getattr(norm, name)
            setattr(norm, name, parameter(old.detach()[kept.to(old.device)], old))
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            old = getattr(norm, name)
            setattr(norm, name, old[kept.to(old.device)])
    norm.num_features = int(kept.sum())


def _compare(found: list[Tensor], expected: list[Tensor], name: str) -> None:
    """Raise where outputs differ."""
    for a, b in zip(found, expected, strict=True):
        limit = max(1e-9, 100 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 0
        difference, size = (a.double() - b.double()).abs().max().item(), b.abs().max().item()
        if not difference <= limit * size:
            raise RuntimeError(
                f"{name} without its silent channels and heads gives other outputs: they differ by "
                f"{difference:.1e}, and the largest is {size:.1e}. It does something that its "
                "trace does not show, at random or with the weights of a masked layer"
            )


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors that a model returns for a copy of the inputs."""
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
        return value

    map_aggregate(model(*copy.deepcopy(inputs)), note)
    return found
