#include "cpu/dispatch.h"
#include "ops.h"

namespace mnp::ops {

void mask_update_(const std::vector<Tensor>& masks, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& velocities, const std::vector<Tensor>& magnitudes,
                  double lr, double momentum, double penalty) {
  const char* op = "mask_update_";
  check_mask_lists(op, masks, grads, velocities, magnitudes);
  MNP_CHECK(masks.empty() || masks[0].is_cpu(), op, ": masks must be on the CPU");
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor grad = to_contiguous(grads[i]);
    const Tensor magnitude = to_contiguous(magnitudes[i]);
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
