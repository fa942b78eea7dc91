#include <array>

#include "conv.h"

namespace mnp::ops {

Tensor torch_forward(const Conv& conv, const Tensor& weight, const Tensor& x) {
  using torch::stable::detail::from;
  const auto pair = [](const int64_t(&values)[2]) { return from(Ints(values, values + 2)); };
  std::array<StableIValue, 9> stack{from(x),           from(weight),       from(std::nullopt),
                                    pair(conv.stride), pair(conv.padding), pair(conv.dilation),
                                    from(false),  // transposed
                                    from(Ints{0, 0}),  from(conv.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to_channels_last(torch::stable::detail::to<Tensor>(stack[0]));
}

}  // namespace mnp::ops
