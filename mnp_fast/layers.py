"""Drop-in masked layers: torch's own, with a mask in [0, 1] for every neuron.

Neurons are the output channels of convolutions and transposed ones, the output features of linear
layers, the channels of batch norms, and the heads of `torch.nn.MultiheadAttention`. A mask's *site*
says what it multiplies (u is what the layer computes from its weights):

========== ==================================== ==================== ===========================
site       with batch norm                      without              what mask 0 leaves
========== ==================================== ==================== ===========================
`neuron`   ``m * (gamma * xhat + beta)``        ``m * (u + bias)``   nothing
`norm`     ``m * gamma * xhat + beta``                               the constant beta
`filter`   ``gamma * norm(m * u) + beta``       ``m * u + bias``     a constant
========== ==================================== ==================== ===========================

Other norms (group, layer, instance norm), and subclasses of batch norms, have no mask. That of the
layer in front of them is at its output, ``norm(m * (u + bias))``: mask 0 makes the channel 0 there.
One subclass, timm's `BatchNormAct2d`, has masks at site `norm` where a model is wrapped at that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .ops import masked_affine, masked_conv2d, masked_linear

M = TypeVar("M", bound="MaskedLayer")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Terms(NamedTuple):
    """Vectors (neurons,) of the equation ``mask * (scale * u + shift) + bias``."""

    mask: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None


def eval_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm's running statistics, without its bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    return scale, -norm.running_mean * scale


def padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of a convolution and the padding with zeros that is left to do."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    return x, conv.padding


def weight_rows(layer: nn.Module) -> Tensor:
    """The weight of a plain or masked layer that has one, with a row ``(neurons, *)`` a neuron."""
    if isinstance(layer, MaskedHeads):
        return layer.plain_weight.unflatten(1, (layer.heads, -1)).transpose(0, 1)
    if isinstance(layer, _TRANSPOSED):  # (channels, neurons of a group, *)
        return layer.weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def masked_output(y: Tensor, mask: Tensor, constant: Tensor | None) -> Tensor:
    """``mask * (y - constant) + constant``, for an output ``(N, K, *)`` and a constant (K,)."""
    if constant is None:
        return masked_affine(y, mask)
    return masked_affine(y, mask, shift=-constant, bias=constant)


class MaskedLayer(nn.Module):
    """What all masked layers share.

    Parameters
    ----------
    *args, **kwargs
        As the plain class.
    site
        One of the class's `sites`; the first of them by default.

    Attributes
    ----------
    mask
        Parameter (neurons,) in [0, 1], in the dtype of the layer's weights; 1 at first.
    site
        What the mask multiplies; one of the class's `sites`.
    weight_owner
        Name, in the wrapped model, of the layer whose weight rows are this layer's neurons:
        the convolution in front of a batch norm. Empty where that is the layer itself.
    norm_behind
        Name of the batch norm that reads this layer's output, and nothing else does; else empty.
    """

    plain: ClassVar[type[nn.Module]]
    sites: ClassVar[tuple[str, ...]]
    mask: nn.Parameter
    site: str
    weight_owner: str
    norm_behind: str

    def __init__(self, *args: Any, site: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_mask(self.sites[0] if site is None else site)

    @classmethod
    def adopt(cls: type[M], module: nn.Module, site: str) -> M:
        """Turn `module`, an instance of the plain class, into a masked layer in place.

        Parameters, buffers, hooks, names and references to it stay as they are.

        Raises
        ------
        TypeError
            The module is not exactly of the plain class.
        ValueError
            Unknown site.
        """
        if type(module) is not cls.plain:
            raise TypeError(
                f"{cls.__name__} masks {cls.plain.__name__}, not {type(module).__name__}"
            )
        module.__class__ = cls
        module._add_mask(site)  # type: ignore[operator]
        return module  # type: ignore[return-value]

    def _add_mask(self, site: str) -> None:
        if site not in self.sites:
            raise ValueError(
                f"site of {type(self).__name__} must be one of {self.sites}, not {site!r}"
            )
        like = next(
            (
                t
                for t in (*self.parameters(recurse=False), *self.buffers(recurse=False))
                if t.is_floating_point()
            ),
            torch.empty(0),
        )
        self.site, self.weight_owner, self.norm_behind = site, "", ""
        self.mask = nn.Parameter(torch.ones(self.neurons, dtype=like.dtype, device=like.device))

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        raise NotImplementedError

    def release(self) -> nn.Module:
        """Fold the mask into the weights and become the plain class again, in place."""
        with torch.no_grad():
            self._fold(self.mask.detach())
        del self.mask, self.site, self.weight_owner, self.norm_behind
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    def _fold(self, mask: Tensor) -> None:
        raise NotImplementedError

    def _multiply(self, name: str, factor: Tensor) -> None:
        """Multiply a neuron's part of a parameter, as a new one: the old one may be shared."""
        old = getattr(self, name)
        if old is None:
            return
        factor = factor.to(old.dtype)
        if name == "weight" and isinstance(self, _TRANSPOSED):  # (channels, neurons of a group, *)
            factor = factor.reshape(self.groups, -1).repeat_interleave(
                old.shape[0] // self.groups, 0
            )
        factor = factor.reshape(*factor.shape, *(1,) * (old.dim() - factor.dim()))
        setattr(self, name, nn.Parameter(old * factor, requires_grad=old.requires_grad))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The plain model's state_dict has no masks: they stay as they are.
        state_dict.setdefault(prefix + "mask", self.mask.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site!r}"


class _MaskedWeights(MaskedLayer):
    """Layers whose neurons are rows of a weight."""

    sites: ClassVar[tuple[str, ...]] = ("neuron", "filter")
    weight: Tensor
    bias: Tensor | None

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return weight_rows(self).shape[0]

    def terms(self) -> Terms:
        """What the equation's operators take besides the weight."""
        if self.site == "neuron":
            return Terms(self.mask, shift=self.bias)
        return Terms(self.mask, bias=self.bias)

    def _fold(self, mask: Tensor) -> None:
        self._multiply("weight", mask)
        if self.site == "neuron":
            self._multiply("bias", mask)


class MaskedConv2d(_MaskedWeights, nn.Conv2d):
    """`torch.nn.Conv2d` with a mask for every output channel.

    Parameters
    ----------
    *args, **kwargs
        As `MaskedLayer`.
    algorithm
        As in `mnp_fast.ops.masked_conv2d`. It is not stored in the `state_dict`.
    """

    plain = nn.Conv2d
    algorithm: str = "auto"

    def __init__(self, *args: Any, algorithm: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.algorithm = algorithm

    def release(self) -> nn.Module:
        """Fold the mask into the weights and become the plain class again, in place."""
        self.__dict__.pop("algorithm", None)
        return super().release()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input[None])[0]
        input, padding = padded(self, input)
        return masked_conv2d(
            input,
            self.weight,
            *self.terms(),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            algorithm=self.algorithm,
        )


class MaskedLinear(_MaskedWeights, nn.Linear):  # type: ignore[misc]  # torch: bias may be None
    """`torch.nn.Linear` with a mask for every output feature."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:  # sequences of several lengths, as torch's encoders make
            if self.mask.dim() == 2:
                raise RuntimeError("masks per sample are not possible for nested tensors")
            return torch.nested.as_nested_tensor([self(part) for part in input.unbind()])
        return masked_linear(input, self.weight, *self.terms())


class _MaskedConvNd(_MaskedWeights):
    """Convolutions that torch computes; the mask is at their output."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dim() == self.weight.dim() - 1:
            return self.forward(input[None], *args, **kwargs)[0]
        y = super().forward(input, *args, **kwargs)
        return masked_output(y, self.mask, self.bias if self.site == "filter" else None)


class MaskedConv1d(_MaskedConvNd, nn.Conv1d):
    """`torch.nn.Conv1d` with a mask for every output channel."""

    plain = nn.Conv1d


class MaskedConv3d(_MaskedConvNd, nn.Conv3d):
    """`torch.nn.Conv3d` with a mask for every output channel."""

    plain = nn.Conv3d


class MaskedConvTranspose1d(_MaskedConvNd, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a mask for every output channel."""

    plain = nn.ConvTranspose1d


class MaskedConvTranspose2d(_MaskedConvNd, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a mask for every output channel."""

    plain = nn.ConvTranspose2d


class MaskedConvTranspose3d(_MaskedConvNd, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a mask for every output channel."""

    plain = nn.ConvTranspose3d


class MaskedHeads(MaskedLayer, NonDynamicallyQuantizableLinear):
    """The output projection of `torch.nn.MultiheadAttention` with a mask for every head.

    Only the attention reads this layer, and only its weight: what the mask multiplies is that
    weight's columns, which are what a head is worth. Masks per sample are not possible. Made by
    `adopt` alone.
    """

    plain = NonDynamicallyQuantizableLinear
    sites = ("neuron",)
    heads: int

    @classmethod
    def adopt(cls, module: nn.Module, site: str) -> MaskedHeads:
        """Turn the projection of `module`, a `torch.nn.MultiheadAttention`, into one in place."""
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"{cls.__name__} masks MultiheadAttention, not {type(module).__name__}")
        vars(module.out_proj)["heads"] = module.num_heads
        return super().adopt(module.out_proj, site)

    @property
    def neurons(self) -> int:
        """Number of heads."""
        return self.heads

    @property
    def plain_weight(self) -> Tensor:
        """The weight without the mask."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (features, heads * width) with the mask on its columns."""
        if self.mask.shape != (self.heads,):
            raise RuntimeError(
                f"a mask of heads must have shape ({self.heads},), not {tuple(self.mask.shape)}"
            )
        return self.plain_weight * self.mask.repeat_interleave(self.in_features // self.heads)

    def release(self) -> nn.Module:
        """Fold the mask into the weight and become the plain class again, in place."""
        super().release()
        del self.heads
        return self

    def _fold(self, mask: Tensor) -> None:
        trains = self.plain_weight.requires_grad
        self._parameters["weight"] = nn.Parameter(self.weight, requires_grad=trains)


class _MaskedBatchNorm(MaskedLayer, _BatchNorm):
    """Batch norms, which are affine in eval mode."""

    sites: ClassVar[tuple[str, ...]] = ("norm", "neuron")

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self.num_features

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        beta = self.bias
        if self.training or self.running_mean is None or self.running_var is None:
            y = self._normalize(input)
            return masked_output(y, self.mask, beta if self.site == "norm" else None)
        return masked_affine(input, *self.terms())

    def _normalize(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def terms(self) -> Terms:
        """What the equation's operators take in eval mode with running statistics."""
        scale, shift = eval_affine(self)
        if self.site == "norm" or self.bias is None:
            return Terms(self.mask, scale, shift, self.bias)
        return Terms(self.mask, scale, shift + self.bias)

    def _fold(self, mask: Tensor) -> None:
        if not self.affine:
            self.affine = True
            self.weight = nn.Parameter(torch.ones_like(mask))
            self.bias = nn.Parameter(torch.zeros_like(mask))
        self._multiply("weight", mask)
        if self.site == "neuron":
            self._multiply("bias", mask)


class MaskedBatchNorm1d(_MaskedBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with a mask for every channel."""

    plain = nn.BatchNorm1d


class MaskedBatchNorm2d(_MaskedBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a mask for every channel."""

    plain = nn.BatchNorm2d


class MaskedBatchNorm3d(_MaskedBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with a mask for every channel."""

    plain = nn.BatchNorm3d


class MaskedSyncBatchNorm(_MaskedBatchNorm, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with a mask for every channel."""

    plain = nn.SyncBatchNorm


class _MaskedNormAct(_MaskedBatchNorm):
    """Batch norms followed by their own `drop` and `act`; the mask is in front of these."""

    sites: ClassVar[tuple[str, ...]] = ("norm",)
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))

    def _normalize(self, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input)


# By the class that they mask.
MASKED: dict[type[nn.Module], type[MaskedLayer]] = {
    nn.MultiheadAttention: MaskedHeads,
    **{
        cls.plain: cls
        for cls in (
            MaskedConv1d,
            MaskedConv2d,
            MaskedConv3d,
            MaskedConvTranspose1d,
            MaskedConvTranspose2d,
            MaskedConvTranspose3d,
            MaskedLinear,
            MaskedBatchNorm1d,
            MaskedBatchNorm2d,
            MaskedBatchNorm3d,
            MaskedSyncBatchNorm,
        )
    },
}


# Batch norms with `drop` and `act` behind them, by name: their packages are not imported.
NORM_ACTS = {"MaskedBatchNormAct2d": ("timm.layers.norm_act", "BatchNormAct2d")}


def is_norm_act(kind: Any) -> bool:
    """Whether a class is a batch norm that is followed by its own `drop` and `act`."""
    return isinstance(kind, type) and (kind.__module__, kind.__qualname__) in NORM_ACTS.values()


_masked_norm_acts: dict[type[nn.Module], type[MaskedLayer]] = {}


def masked_class(kind: type[nn.Module]) -> type[MaskedLayer] | None:
    """The class that masks the layers of exactly this class."""
    if not is_norm_act(kind):
        return MASKED.get(kind)
    if kind not in _masked_norm_acts:
        members = {"plain": kind, "__module__": __name__}
        made = type(f"Masked{kind.__qualname__}", (_MaskedNormAct, kind), members)
        _masked_norm_acts[kind] = made
    return _masked_norm_acts[kind]


def __getattr__(name: str) -> type[MaskedLayer]:
    """Masked classes that exist once a model has such layers, for pickles of it."""
    if name not in NORM_ACTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, kind = NORM_ACTS[name]
    masked = masked_class(getattr(import_module(package), kind))
    assert masked is not None
    return masked


def block_terms(conv: nn.Conv2d | None, norm: _BatchNorm | None) -> Terms:
    """Mask, scale, shift and bias of the equation; u is the convolution without its bias."""
    if isinstance(norm, _MaskedBatchNorm):
        mask, scale, shift, bias = norm.terms()
        if conv is not None and conv.bias is not None:
            assert scale is not None
            assert shift is not None
            shift = shift + scale * conv.bias
        return Terms(mask, scale, shift, bias)
    assert isinstance(conv, MaskedConv2d)
    inner = conv.terms()
    if norm is None:
        return inner
    scale, offset = eval_affine(norm)
    if norm.bias is not None:
        offset = offset + norm.bias
    if inner.bias is not None:
        offset = offset + scale * inner.bias
    shift = None if inner.shift is None else scale * inner.shift
    return Terms(inner.mask, scale, shift, offset)
