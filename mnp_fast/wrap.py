"""Masks on a whole model, and back: `wrap`, `masks`, `unwrap`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .dataflow import WEIGHTED, data_flow
from .fusion import FusedForward, fuse_blocks
from .layers import MaskedBatchNorm2d, MaskedConv2d, MaskedLayer, MaskedLinear
from .ops.conv import ALGORITHMS, allows

SITES = ("auto", "neuron", "norm", "filter")
_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {
    cls.plain: cls for cls in (MaskedConv2d, MaskedLinear, MaskedBatchNorm2d)
}


def wrap(
    model: nn.Module,
    site: str = "auto",
    *,
    example_inputs: tuple[Any, ...] | None = None,
    algorithm: str = "auto",
    fuse: bool = True,
) -> nn.Module:
    """A copy of the model with a mask for every neuron; outputs are equal while all masks are 1.

    The copy has the same class, methods and parameters; its convolutions, linear layers or batch
    norms have become masked ones. Layers that make the model's output, such as a classifier,
    get no mask: their neurons are the classes.

    Parameters
    ----------
    model
        Any module; it is not changed.
    site
        What masks multiply (see `mnp_fast.layers`). `"norm"`: the scale of every batch norm.
        `"neuron"`: the whole output of every neuron, after its batch norm if it has one.
        `"filter"`: the weights of every convolution and linear layer. `"auto"`: `"norm"` on every
        batch norm, and `"neuron"` on the layers that no batch norm follows.
    example_inputs
        Inputs to run the model on, needed only where it cannot be traced symbolically.
    algorithm
        What the masked convolutions compute with, as in `mnp_fast.ops.masked_conv2d`;
        `"winograd2"` and `"winograd4"` where a convolution allows it, else `"auto"`.
    fuse
        Whether a convolution, its norm, an addition and a ReLU run as one operator in eval mode,
        where the model can be traced symbolically. What its `forward` decides by attributes of
        modules, other than `training`, is then decided once. A model with hooks on its modules, or
        under `torch.compile`, `torch.export`, transforms of `torch.func` or autocast, runs as if it
        were not fused; so does one that changes a value in place and reads it by another name.

    Returns
    -------
    nn.Module
        The masked model. It loads the plain model's `state_dict`, and its own.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        Unknown site or algorithm, a model that is wrapped already, has nothing to mask, or cannot
        be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if site not in SITES:
        raise ValueError(f"site must be one of {SITES}, not {site!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, not {algorithm!r}")
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("model is wrapped already")
    masked = copy.deepcopy(model)
    flow = data_flow(masked, example_inputs)
    followed = set(flow.norm_inputs.values())
    for name, module in list(masked.named_modules()):
        if type(module) not in _MASKED or name in flow.outputs:
            continue
        is_norm = not isinstance(module, WEIGHTED)
        if site == "filter":
            chosen = None if is_norm else "filter"
        elif is_norm:
            chosen = "norm" if site == "auto" else site
        else:
            chosen = None if site == "norm" or name in followed else "neuron"
        if chosen is not None:
            layer = _MASKED[type(module)].adopt(module, chosen)
            layer.weight_owner = flow.norm_inputs.get(name, "")
            if isinstance(layer, MaskedConv2d) and (allows(layer, algorithm)):
                layer.algorithm = algorithm
    if not masks(masked):
        kinds = ", ".join(cls.__name__ for cls in _MASKED)
        raise ValueError(
            f"{type(model).__name__} has nothing to mask at site {site!r}: no layer of kind "
            f"{kinds} but those that make its output"
        )
    if fuse:
        fuse_blocks(masked, algorithm)
    return masked


def masks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The masks of a wrapped model, (neurons,) each, by name of their layer in order of modules."""
    return {name: layer.mask for name, layer in masked_layers(model).items()}


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)
    }


def unwrap(model: nn.Module) -> nn.Module:
    """A copy of a wrapped model with the masks folded into its weights.

    It is made of torch's own layers again, so it runs, pickles and exports without mnp_fast;
    its outputs equal the masked model's.

    Raises
    ------
    ValueError
        The model is not wrapped.
    """
    if not masked_layers(model):
        raise ValueError(f"{type(model).__name__} has no masks: only a wrapped model is unwrapped")
    plain = copy.deepcopy(model)
    if isinstance(vars(plain).get("forward"), FusedForward):
        del plain.forward
    for layer in masked_layers(plain).values():
        layer.release()
    return plain
