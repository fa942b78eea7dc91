"""The operators: typed functions over the compiled kernels, differentiable and traceable."""

from .affine import masked_affine
from .conv import masked_conv2d
from .linear import masked_linear
from .magnitude import neuron_magnitude
from .update import mask_update_

__all__ = ["mask_update_", "masked_affine", "masked_conv2d", "masked_linear", "neuron_magnitude"]
