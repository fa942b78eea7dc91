#include "ops.h"

namespace mnp::ops {

void mask_update_(const std::vector<Tensor>& masks, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& velocities, const std::vector<Tensor>& magnitudes,
                  double lr, double momentum, double penalty) {
  const char* op = "mask_update_";
  MNP_CHECK(masks.size() == grads.size() && masks.size() == velocities.size() &&
                masks.size() == magnitudes.size(),
            op, ": masks, grads, velocities and magnitudes must have the same length, not ",
            masks.size(), ", ", grads.size(), ", ", velocities.size(), " and ", magnitudes.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor& mask = masks[i];
    const ScalarType type = mask.scalar_type();
    MNP_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
              ": masks must be float32 or float64");
    MNP_CHECK(mask.is_cpu() && mask.is_contiguous() && velocities[i].is_contiguous(), op,
              ": masks and velocities must be contiguous CPU tensors");
    check_like(op, "grads", grads[i], mask);
    check_like(op, "velocities", velocities[i], mask);
    check_like(op, "magnitudes", magnitudes[i], mask);
  }
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor grad = torch::stable::contiguous(grads[i]);
    const Tensor magnitude = torch::stable::contiguous(magnitudes[i]);
    with_type(masks[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const cpu::MaskUpdate<T> a{
          mutable_data<T>(masks[i]), data<T>(grad),      mutable_data<T>(velocities[i]),
          data<T>(magnitude),        static_cast<T>(lr), static_cast<T>(momentum),
          static_cast<T>(penalty)};
      torch::stable::parallel_for(0, masks[i].numel(), grain(1), [&](int64_t begin, int64_t end) {
        cpu::kernels_of<T>().mask_update(a, begin, end);
      });
    });
  }
}

}  // namespace mnp::ops
