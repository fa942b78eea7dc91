// The operators, as library.cpp registers them. Their definition is mnp_fast/reference.py.
#pragma once

#include <tuple>

#include "tensors.h"

namespace mnp::ops {

std::tuple<Tensor, Tensor> masked_conv2d(const Tensor& x, const Tensor& weight,
                                         const MaybeTensor& mask, const MaybeTensor& scale,
                                         const MaybeTensor& shift, const MaybeTensor& bias,
                                         const MaybeTensor& residual, const Ints& stride,
                                         const Ints& padding, const Ints& dilation, int64_t groups,
                                         const std::string& activation, bool keep_u,
                                         const std::string& algorithm);

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& y,
    const MaybeTensor& u, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, bool need_x, bool need_weight, bool need_residual, bool need_sums,
    const std::string& algorithm);

// The same for code that has its own formula for autograd: images are channels-last, the output's
// activity stands in for it, the input is given only where the weight takes gradients, and `add`
// is added to its gradient.
std::tuple<Tensor, Tensor, Tensor> conv2d_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
    const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
    const std::string& activation, bool keep_u, bool keep_active, const std::string& algorithm);

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(
    const Tensor& grad, const MaybeTensor& x, const Ints& x_size, const Tensor& weight,
    const MaybeTensor& y, const MaybeTensor& active, const MaybeTensor& u, const MaybeTensor& mask,
    const MaybeTensor& scale, const MaybeTensor& shift, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool need_x, bool need_weight, bool need_residual,
    bool need_sums, const std::string& algorithm, const MaybeTensor& add);

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

}  // namespace mnp::ops
