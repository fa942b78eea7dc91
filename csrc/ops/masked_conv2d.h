// Masked convolution for code that has its own formula for autograd.
#pragma once

#include <tuple>

#include "tensors.h"

namespace mnp::ops {

// What the backward knows of u: u itself or, where no mask is small, the output and what was added.
struct KnownU {
  MaybeTensor u, output, bias, residual;
};

// As the operators, but images are channels-last, the output's activity may stand in for it, the
// input is given only where the weight takes gradients, `add` is added to its gradient, and
// `add_to_u`, (K,), to the gradient of u.
std::tuple<Tensor, Tensor, Tensor> conv2d_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
    const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
    const std::string& activation, bool keep_u, bool keep_active, const std::string& algorithm);

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(
    const Tensor& grad, const MaybeTensor& x, const Ints& x_size, const Tensor& weight,
    const MaybeTensor& y, const MaybeTensor& active, const KnownU& known, const MaybeTensor& mask,
    const MaybeTensor& scale, const MaybeTensor& shift, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool need_x, bool need_weight, bool need_residual,
    bool need_sums, const std::string& algorithm, const MaybeTensor& add,
    const MaybeTensor& add_to_u);

}  // namespace mnp::ops
