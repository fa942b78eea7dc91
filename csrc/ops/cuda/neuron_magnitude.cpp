#include "ops.h"

namespace mnp::ops::cuda_ops {

std::vector<Tensor> neuron_magnitude(const std::vector<Tensor>& weights, const std::string& norm) {
  const char* op = "neuron_magnitude";
  const Norm kind = parse_norm(op, norm);
  MNP_CHECK(kind != Norm::spectral, op,
            ": norm 'spectral' has no CUDA kernel; mnp_fast.ops.neuron_magnitude computes it");
  std::vector<Tensor> dense, norms;
  std::vector<cuda::NeuronRows> layers[4];  // by Element
  for (const Tensor& given : weights) {
    MNP_CHECK(given.dim() >= 1, op, ": weights must have shape (neurons, *), not ",
              shape_of(given));
    MNP_CHECK(same_device(given, weights[0]), op, ": weights must be on one device");
    norms.push_back(empty_on(given, {given.size(0)}, compute_type(op, given)));
    if (given.numel() == 0) {
      torch::stable::zero_(norms.back());
      continue;
    }
    dense.push_back(has_dense_rows(given) ? given : torch::stable::contiguous(given));
    const Tensor& w = dense.back();
    layers[static_cast<int>(element_of(w.scalar_type()))].push_back(
        {w.const_data_ptr(), w.size(0), w.numel() / w.size(0), w.stride(0),
         norms.back().mutable_data_ptr()});
  }
  if (weights.empty()) return norms;
  const OnDeviceOf device(weights[0]);
  for (int element = 0; element < 4; ++element)
    check_launch(op, cuda::magnitude(layers[element].data(), layers[element].size(),
                                     static_cast<Element>(element), kind, device.stream()));
  return norms;
}

}  // namespace mnp::ops::cuda_ops
