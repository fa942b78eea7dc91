"""How large the weights of each neuron are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import MaskedLayer, weight_rows
from ..ops import neuron_magnitude
from ..wrap import masked_layers

# By name: the norm of a neuron's own weights, and whether the batch norm is folded into them.
_KINDS = {
    "l1": ("l1", False),
    "l2": ("l2", False),
    "linf": ("linf", False),
    "effective": ("l2", True),
    "spectral": ("spectral", True),
}
MAGNITUDES = tuple(_KINDS)


def magnitudes(masked: nn.Module, kind: str = "l1") -> dict[str, Tensor]:
    """Magnitude of each neuron, (neurons,), by name of its masked layer; masks do not count.

    A batch norm's neurons are the filters of the layer in front; where there is none, the filter is
    that of its scale (1 without one). A head's weights are its columns of the output projection.

    Parameters
    ----------
    masked
        A wrapped model.
    kind
        `"l1"` (the paper's), `"l2"`, `"linf"`: that norm of the neuron's own weights.
        `"effective"`: l2 norm of the filter with its batch norm folded in as the network computes
        it, ``|w| * |gamma| / sqrt(var + eps)``. Rescaling a filter together with its batch norm so
        that outputs stay leaves it as it is.
        `"spectral"`: largest singular value of the filter as a matrix (channels, taps), times
        ``|gamma| / sqrt(var)``: the score of channel Lipschitzness pruning (CLP, arXiv 2208.03111),
        which leaves out eps. It is used nevertheless where var is 0.
        Without running statistics the batch norm counts with gamma alone.

    Raises
    ------
    ValueError
        Unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(MAGNITUDES)}, not {kind!r}")
    norm, fold = _KINDS[kind]
    layers = masked_layers(masked)
    found = neuron_magnitude([_rows(masked, layer) for layer in layers.values()], norm)
    result = dict(zip(layers, found, strict=True))
    if fold:
        for name, layer in layers.items():
            gain = _gain(masked, layer, with_eps=kind == "effective")
            result[name] = result[name] if gain is None else result[name] * gain
    return result


def _rows(masked: nn.Module, layer: MaskedLayer) -> Tensor:
    owner = masked.get_submodule(layer.weight_owner) if layer.weight_owner else layer
    bare = getattr(owner, "weight", None) is None
    return torch.ones_like(layer.mask) if bare else weight_rows(owner)


@torch.no_grad()
def _gain(masked: nn.Module, layer: MaskedLayer, with_eps: bool) -> Tensor | None:
    """What a neuron's batch norm multiplies its weights by; None where it has none."""
    norm = masked.get_submodule(layer.norm_behind) if layer.norm_behind else layer
    if not isinstance(norm, _BatchNorm):
        return None
    # The scale of a batch norm without a layer in front is its weight already.
    own = not layer.norm_behind and not layer.weight_owner
    gain = torch.ones_like(layer.mask) if norm.weight is None or own else norm.weight.abs()
    if norm.running_var is None:
        return gain
    var = norm.running_var.to(gain.dtype)
    eps = torch.full_like(var, norm.eps)
    return gain * torch.rsqrt(var + eps if with_eps else torch.where(var == 0, eps, var))
