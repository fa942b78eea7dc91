// The neurons of a block ``relu(norm(conv(x)) + residual)`` with a mask, in eval mode.
#pragma once

#include "tensors.h"

namespace mnp::ops {

// Vectors (K,) of ``mask * (scale * u + shift) + bias``.
struct Terms {
  Tensor scale, shift, bias;
};

// What takes gradients besides a convolution's weight, in this order.
enum Vector { kMask, kConvBias, kNormWeight, kNormBias, kVectors };

// A mask, (K,) or per sample (N, K), a convolution's bias and a batch norm's vectors, (K,); mean
// and variance are given together or not at all.
struct Neurons {
  Tensor mask;
  MaybeTensor conv_bias, norm_weight, norm_bias, mean, var;
  double eps;
  // Which addends the mask multiplies.
  bool masks_conv_bias, masks_mean, masks_norm_bias;

  // Makes all vectors contiguous; fails unless they fit `count` neurons and `batch` images like x.
  void prepare(const char* op, int64_t count, int64_t batch, const Tensor& x);

  Terms terms(int64_t count, ScalarType type) const;

  // The gradients that are needed, from the backward's sums (3, N, K); the others stay undefined.
  std::vector<Tensor> grads(const Tensor& sums, const bool (&needed)[kVectors]) const;
};

}  // namespace mnp::ops
