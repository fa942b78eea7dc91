// The CUDA implementations of the operators in ../../library.cpp. Convolutions are torch's,
// followed by masked_affine: see mnp_fast/ops/conv.py.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(mnp_fast, CUDA, m) {
  m.impl("masked_affine", TORCH_BOX(&mnp::ops::cuda_ops::masked_affine));
  m.impl("masked_affine_backward", TORCH_BOX(&mnp::ops::cuda_ops::masked_affine_backward));
  m.impl("neuron_magnitude", TORCH_BOX(&mnp::ops::cuda_ops::neuron_magnitude));
  m.impl("mask_update_", TORCH_BOX(&mnp::ops::cuda_ops::mask_update_));
}
