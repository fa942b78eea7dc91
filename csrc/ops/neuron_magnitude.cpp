#include "ops.h"

namespace mnp::ops {

std::vector<Tensor> neuron_magnitude(const std::vector<Tensor>& weights, const std::string& norm) {
  const char* op = "neuron_magnitude";
  MNP_CHECK(norm == "l1" || norm == "l2" || norm == "linf", op,
            ": norm must be 'l1', 'l2' or 'linf', not '", norm, "'");
  const cpu::Norm kind = norm == "l1"   ? cpu::Norm::l1
                         : norm == "l2" ? cpu::Norm::l2
                                        : cpu::Norm::linf;
  for (const Tensor& w : weights)
    MNP_CHECK(w.is_cpu() && w.dim() >= 1, op,
              ": weights must be CPU tensors of shape (neurons, *), not ", shape_of(w));
  std::vector<Tensor> result;
  for (const Tensor& given : weights) {
    const ScalarType type = compute_type(op, given);
    const Tensor w = torch::stable::contiguous(as_type(given, type));
    const int64_t neurons = w.size(0), size = neurons ? w.numel() / neurons : 0;
    Tensor out = torch::stable::empty({neurons}, type);
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      torch::stable::parallel_for(0, neurons, grain(size), [&](int64_t begin, int64_t end) {
        cpu::kernels_of<T>().magnitude(data<T>(w), size, kind, mutable_data<T>(out), begin, end);
      });
    });
    result.push_back(out);
  }
  return result;
}

}  // namespace mnp::ops
