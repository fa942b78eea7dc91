// The operators on CUDA tensors: the same checks as on the CPU, then one or a few launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "cuda/kernels.h"
#include "ops/tensors.h"

// Declared in torch's header for code that is built with CUDA's headers alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);

namespace mnp::ops::cuda_ops {

Tensor masked_affine(const Tensor& x, const MaybeTensor& mask, const MaybeTensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
                     const std::string& activation);

std::tuple<Tensor, Tensor, Tensor> masked_affine_backward(const Tensor& grad, const Tensor& x,
                                                          const MaybeTensor& y,
                                                          const MaybeTensor& mask,
                                                          const MaybeTensor& scale,
                                                          const MaybeTensor& shift, bool need_x,
                                                          bool need_residual, bool need_sums);

std::vector<Tensor> neuron_magnitude(const std::vector<Tensor>& weights, const std::string& norm);

void mask_update_(const std::vector<Tensor>& masks, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& velocities, const std::vector<Tensor>& magnitudes,
                  double lr, double momentum, double penalty);

// Makes a tensor's device the current one for a while, and knows torch's stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

inline void check_launch(const char* op, cuda::Error error) {
  MNP_CHECK(!error, op, ": CUDA could not run the kernel: ", error);
}

// An empty tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

}  // namespace mnp::ops::cuda_ops
