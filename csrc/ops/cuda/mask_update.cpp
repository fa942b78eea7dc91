#include "ops.h"

namespace mnp::ops::cuda_ops {

void mask_update_(const std::vector<Tensor>& masks, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& velocities, const std::vector<Tensor>& magnitudes,
                  double lr, double momentum, double penalty) {
  const char* op = "mask_update_";
  check_mask_lists(op, masks, grads, velocities, magnitudes);
  if (masks.empty()) return;
  const OnDeviceOf device(masks[0]);
  std::vector<Tensor> read;  // what the kernels read, until they are launched
  const auto contiguous = [&](const Tensor& t) {
    read.push_back(torch::stable::contiguous(t));
    return read.back().const_data_ptr();
  };
  std::vector<cuda::MaskStep> layers[2];  // float32, float64
  for (size_t i = 0; i < masks.size(); ++i)
    layers[masks[i].scalar_type() == ScalarType::Double].push_back(
        {masks[i].mutable_data_ptr(), contiguous(grads[i]), velocities[i].mutable_data_ptr(),
         contiguous(magnitudes[i]), masks[i].numel()});
  for (const Element element : {Element::f32, Element::f64}) {
    const auto& of_element = layers[element == Element::f64];
    check_launch(op, cuda::mask_update(of_element.data(), of_element.size(), element, lr, momentum,
                                       penalty, device.stream()));
  }
}

}  // namespace mnp::ops::cuda_ops
