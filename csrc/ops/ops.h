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

// Blocks that follow each other in a network, with no Python in between.
//
// Values are numbered from 0: the inputs, images (N, C, H, W), then the output of every block.
//
// `plan` has for every block: the values that it reads as x and as residual, -1 without one;
// whether it ends in a ReLU; stride, padding and dilation for height and width; groups; a bit each
// for what it has of the convolution's bias, the norm's weight, bias, mean and variance; and a bit
// each for whether the mask multiplies the convolution's bias, the mean and the norm's bias.
// `parts` has weight, mask, and these, of one block after the other; `eps` and `algorithms` are one
// a block. `outputs` are the numbers of the values to return; those beyond the last value stand for
// the mean (K,) of each block's u over samples and pixels.
//
// `needed` says of each of the inputs, then of the parts, whether it takes gradients; all are 0
// where none is needed. Behind its outputs the forward returns what the backward needs.
std::vector<Tensor> region_forward(const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& parts, const Ints& plan,
                                   const std::vector<double>& eps, const Names& algorithms,
                                   const Ints& outputs, const Ints& needed);

// Gradients of inputs and parts; undefined ones where they are not needed. `grads` are those of the
// outputs, `sizes` those of the inputs, and `kept` is what the forward returned behind them, after
// the inputs that are read by a convolution whose weight takes gradients.
std::vector<Tensor> region_backward(const std::vector<MaybeTensor>& grads,
                                    const std::vector<Tensor>& kept,
                                    const std::vector<Tensor>& parts, const Ints& plan,
                                    const std::vector<double>& eps, const Names& algorithms,
                                    const Ints& outputs, const Ints& needed, const Ints& sizes);

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
