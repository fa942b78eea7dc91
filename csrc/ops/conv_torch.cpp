#include <array>

#include "conv.h"

namespace mnp::ops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

StableIValue pair(const int64_t (&values)[2]) { return from(Ints(values, values + 2)); }

}  // namespace

Tensor torch_forward(const Conv& conv, const Tensor& weight, const Tensor& x) {
  std::array<StableIValue, 9> stack{from(x),           from(weight),       from(std::nullopt),
                                    pair(conv.stride), pair(conv.padding), pair(conv.dilation),
                                    from(false),  // transposed
                                    from(Ints{0, 0}),  from(conv.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to_channels_last(to<Tensor>(stack[0]));
}

Tensor torch_weight_grad(const Conv& conv, const Tensor& g, const Tensor& x, const Tensor& weight) {
  const std::array<bool, 3> wanted{false, true, false};  // of input, weight and bias
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  std::array<StableIValue, 11> stack{from(g),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),  // sizes of the bias
                                     pair(conv.stride),
                                     pair(conv.padding),
                                     pair(conv.dilation),
                                     from(false),  // transposed
                                     from(Ints{0, 0}),
                                     from(conv.groups),
                                     from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const std::array<Tensor, 3> grads{to<Tensor>(stack[0]), to<Tensor>(stack[1]),
                                    to<Tensor>(stack[2])};
  return to_contiguous(grads[1]);
}

}  // namespace mnp::ops
