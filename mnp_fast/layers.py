"""Drop-in masked layers: torch's own, with a mask in [0, 1] for every neuron.

A mask's *site* says what it multiplies (u is what the layer computes from its weights):

========== ==================================== ==================== ===========================
site       with batch norm                      without              what mask 0 leaves
========== ==================================== ==================== ===========================
`neuron`   ``m * (gamma * xhat + beta)``        ``m * (u + bias)``   nothing
`norm`     ``m * gamma * xhat + beta``                               the constant beta
`filter`   ``gamma * norm(m * u) + beta``       ``m * u + bias``     a constant
========== ==================================== ==================== ===========================
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import masked_affine, masked_conv2d, masked_linear

M = TypeVar("M", bound="MaskedLayer")


class Terms(NamedTuple):
    """Vectors (neurons,) of the equation ``mask * (scale * u + shift) + bias``."""

    mask: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None


def eval_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
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


class MaskedLayer(nn.Module):
    """What all masked layers share.

    Attributes
    ----------
    mask
        Parameter (neurons,) in [0, 1], in the dtype of the layer's weights; 1 at first.
    site
        What the mask multiplies; one of the class's `sites`.
    weight_owner
        Name, in the wrapped model, of the layer whose weight rows are this layer's neurons:
        the convolution in front of a batch norm. Empty where that is the layer itself.
    """

    plain: ClassVar[type[nn.Module]]
    sites: ClassVar[tuple[str, ...]]
    mask: nn.Parameter
    site: str
    weight_owner: str

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
        self.site, self.weight_owner = site, ""
        self.mask = nn.Parameter(torch.ones(self.neurons, dtype=like.dtype, device=like.device))

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        raise NotImplementedError

    def release(self) -> nn.Module:
        """Fold the mask into the weights and become the plain class again, in place."""
        with torch.no_grad():
            self._fold(self.mask.detach())
        del self.mask, self.site, self.weight_owner
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    def _fold(self, mask: Tensor) -> None:
        raise NotImplementedError

    def _multiply(self, name: str, factor: Tensor) -> None:
        """Multiply a parameter's rows, as a new parameter: the old one may be shared."""
        old = getattr(self, name)
        if old is None:
            return
        rows = factor.to(old.dtype).reshape(-1, *(1,) * (old.dim() - 1))
        setattr(self, name, nn.Parameter(old * rows, requires_grad=old.requires_grad))

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
        return self.weight.shape[0]

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
        As `torch.nn.Conv2d`.
    site
        `"neuron"` or `"filter"`.
    algorithm
        As in `mnp_fast.ops.masked_conv2d`. It is not stored in the `state_dict`.
    """

    plain = nn.Conv2d
    algorithm: str = "auto"

    def __init__(
        self, *args: Any, site: str = "neuron", algorithm: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_mask(site)
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
    """`torch.nn.Linear` with a mask for every output feature.

    Parameters
    ----------
    *args, **kwargs
        As `torch.nn.Linear`.
    site
        `"neuron"` or `"filter"`.
    """

    plain = nn.Linear

    def __init__(self, *args: Any, site: str = "neuron", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_mask(site)

    def forward(self, input: Tensor) -> Tensor:
        return masked_linear(input, self.weight, *self.terms())


class MaskedBatchNorm2d(MaskedLayer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a mask for every channel.

    Parameters
    ----------
    *args, **kwargs
        As `torch.nn.BatchNorm2d`.
    site
        `"norm"` or `"neuron"`.
    """

    plain = nn.BatchNorm2d
    sites = ("norm", "neuron")

    def __init__(self, *args: Any, site: str = "norm", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_mask(site)

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self.num_features

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        beta = self.bias
        if self.training or self.running_mean is None or self.running_var is None:
            y = super().forward(input)
            if self.site == "neuron" or beta is None:
                return masked_affine(y, self.mask)
            return masked_affine(y, self.mask, shift=-beta, bias=beta)
        return masked_affine(input, *self.terms())

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


def block_terms(conv: nn.Conv2d | None, norm: nn.BatchNorm2d | None) -> Terms:
    """Mask, scale, shift and bias of the equation; u is the convolution without its bias."""
    if isinstance(norm, MaskedBatchNorm2d):
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
