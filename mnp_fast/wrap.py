"""Masks on a whole model, and back: `wrap`, `masks`, `unwrap`."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .dataflow import LAYERS, NORM, Flow, data_flow
from .fusion import FusedForward, fuse_blocks
from .layers import MASKED, MaskedConv2d, MaskedLayer, masked_class
from .maskable import Selector, check_copies, check_weights, quantized_modules, select
from .ops.conv import ALGORITHMS, allows

SITES = ("auto", "neuron", "norm", "filter")


def wrap(
    model: nn.Module,
    site: str = "auto",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    algorithm: str = "auto",
    fuse: bool = True,
) -> nn.Module:
    """A copy of the model with a mask for every neuron; outputs are equal while all masks are 1.

    The copy has the same class, methods and parameters; its convolutions, linear layers, batch
    norms or attentions have become masked ones. Without a mask are layers that make the model's
    output, such as a classifier, because their neurons are the classes; subclasses of torch's
    layers; layers that do not run in eval mode; and layers whose weights are read by something else
    than their own `forward`. The neurons of `torch.nn.MultiheadAttention` are its heads, those of
    attention written with linear layers are the outputs of these.

    Parameters
    ----------
    model
        Any module; it is not changed.
    site
        What masks multiply (see `mnp_fast.layers`). `"norm"`: the scale of every batch norm, and of
        timm's batch norms with an activation.
        `"neuron"`: the whole output of every neuron, after its batch norm if it has one, and in
        front of any other norm; heads of attention too.
        `"filter"`: the weights of every convolution and linear layer. `"auto"`: `"norm"` on every
        batch norm, and `"neuron"` on the layers that no batch norm follows and on heads.
    include, exclude
        Which of these layers get a mask, by the names that `masks` gives: a pattern as in
        `fnmatch`, such as `"layer4.*"`, several of them, or a function of name and plain layer that
        returns a bool. `exclude` counts where both choose.
    example_inputs
        Inputs to run the model on, needed only where it cannot be traced symbolically.
    algorithm
        What the masked convolutions compute with, as in `mnp_fast.ops.masked_conv2d`;
        `"winograd2"` and `"winograd4"` where a convolution allows it and its groups are not narrow,
        else `"auto"`.
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
        `model` is not a module; `include` or `exclude` is not what it may be.
    ValueError
        Unknown site or algorithm, a pattern that matches no layer, a model that is wrapped already,
        has nothing to mask, or cannot be traced; a layer that is lazy and has not run, or is
        parametrised or quantised and not excluded. The message names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if site not in SITES:
        raise ValueError(f"site must be one of {SITES}, not {site!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, not {algorithm!r}")
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("model is wrapped already")
    check_copies(model)
    masked = copy.deepcopy(model)
    flow = data_flow(masked, example_inputs)
    targets = _targets(masked, flow, site)
    candidates = {name: module for name, (module, _) in targets.items()}
    candidates |= quantized_modules(masked)
    chosen = select(candidates, include, exclude)
    for name in sorted(chosen):
        check_weights(name, candidates[name])
        check_weights(name, masked.get_submodule(name))
    if not chosen:
        kinds = Counter(
            type(module).__name__ for module in masked.modules() if isinstance(module, LAYERS)
        )
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        raise ValueError(
            f"{type(model).__name__} has nothing to mask at site {site!r}. Masks are for layers of "
            "torch's own classes that run by their own forward, are not left out, and do not make "
            f"the output; its layers are: {held}"
        )
    norms_behind = {layer: norm for norm, layer in flow.norm_inputs.items()}
    for name, (module, chosen_site) in targets.items():
        if name not in chosen:
            continue
        kind = masked_class(type(module))
        assert kind is not None
        layer = kind.adopt(module, chosen_site)
        layer.weight_owner = flow.norm_inputs.get(name, "")
        layer.norm_behind = norms_behind.get(name, "")
        if isinstance(layer, MaskedConv2d) and allows(layer, algorithm):
            layer.algorithm = algorithm
    for module in masked.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval mode it would compute with the weights of its layers, past their masks.
            vars(module)["kept_fast_path"] = module.activation_relu_or_gelu
            vars(module)["activation_relu_or_gelu"] = 0
    if fuse:
        fuse_blocks(masked, algorithm)
    return masked


def _targets(model: nn.Module, flow: Flow, site: str) -> dict[str, tuple[nn.Module, str]]:
    """What shall have a mask, by the name of the layer that will hold it: a module and its site."""
    layers = dict(model.named_modules())
    followed = {layer for norm, layer in flow.norm_inputs.items() if type(layers[norm]) in MASKED}
    targets = {}
    for name, module in layers.items():
        kinds = masked_class if site == "norm" else MASKED.get
        maskable = kinds(type(module)) is not None or parametrize.is_parametrized(module)
        if name not in flow.runs or name in flow.outputs or not maskable:
            continue
        is_norm, is_attention = isinstance(module, NORM), isinstance(module, nn.MultiheadAttention)
        if site == "filter":
            chosen = None if is_norm or is_attention else "filter"
        elif is_norm:
            chosen = "norm" if site == "auto" else site
        else:
            chosen = None if site == "norm" or name in followed else "neuron"
        if chosen is not None:
            targets[f"{name}.out_proj" if is_attention else name] = module, chosen
    return targets


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
    for module in plain.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            vars(module)["activation_relu_or_gelu"] = vars(module).pop(
                "kept_fast_path", module.activation_relu_or_gelu
            )
    return plain
