// The operators of csrc/ops/cuda as those of CPU tensors, with stand-ins for what torch has only in
// builds with CUDA.
#include "ops/cuda/ops.h"

#include <torch/csrc/stable/library.h>

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast, CPU, m) {
  m.impl("masked_affine", TORCH_BOX(&mnp::ops::cuda_ops::masked_affine));
  m.impl("masked_affine_backward", TORCH_BOX(&mnp::ops::cuda_ops::masked_affine_backward));
  m.impl("neuron_magnitude", TORCH_BOX(&mnp::ops::cuda_ops::neuron_magnitude));
  m.impl("mask_update_", TORCH_BOX(&mnp::ops::cuda_ops::mask_update_));
}
