// A convolution's geometry and the algorithms that compute it.
#pragma once

#include "cpu/dispatch.h"
#include "ops.h"
#include "workspace.h"

namespace mnp::ops {

// A convolution's geometry, checked.
struct Conv {
  int64_t n, c, h, w, k, kh, kw, oh, ow, groups;
  int64_t stride[2], padding[2], dilation[2];

  Conv(const char* op, const Ints& x, const Tensor& weight, const Ints& s, const Ints& p,
       const Ints& d, int64_t g)
      : groups(g) {
    MNP_CHECK(x.size() == 4, op, ": x must have shape (N, C, H, W), not ", shape_of(x));
    MNP_CHECK(weight.dim() == 4 && weight.numel() > 0, op,
              ": weight must have shape (K, C / groups, kh, kw), none of them 0, not ",
              shape_of(weight));
    MNP_CHECK(s.size() == 2 && s[0] > 0 && s[1] > 0, op, ": stride must be two positive integers");
    MNP_CHECK(d.size() == 2 && d[0] > 0 && d[1] > 0, op,
              ": dilation must be two positive integers");
    MNP_CHECK(p.size() == 2 && p[0] >= 0 && p[1] >= 0, op,
              ": padding must be two non-negative integers");
    n = x[0], c = x[1], h = x[2], w = x[3];
    k = weight.size(0), kh = weight.size(2), kw = weight.size(3);
    MNP_CHECK(g > 0 && k % g == 0 && c == weight.size(1) * g, op, ": x has ", c,
              " channels and weight has shape ", shape_of(weight),
              ", which do not fit groups = ", g);
    for (int i = 0; i < 2; ++i) stride[i] = s[i], padding[i] = p[i], dilation[i] = d[i];
    oh = (h + 2 * p[0] - d[0] * (kh - 1) - 1) / s[0] + 1;
    ow = (w + 2 * p[1] - d[1] * (kw - 1) - 1) / s[1] + 1;
    MNP_CHECK(h + 2 * p[0] > d[0] * (kh - 1) && w + 2 * p[1] > d[1] * (kw - 1), op,
              ": a kernel of ", kh, "x", kw, " with dilation ", d[0], "x", d[1],
              " does not fit a padded input of ", h + 2 * p[0], "x", w + 2 * p[1]);
  }
  int64_t taps() const { return kh * kw; }
  int64_t group_in() const { return c / groups; }
  int64_t group_out() const { return k / groups; }
  // Multiply-adds of the direct algorithm.
  int64_t products() const { return n * oh * ow * k * group_in() * taps(); }
  bool is_depthwise() const { return groups > 1 && groups == c && groups == k; }
  // A 1x1 kernel that reads every pixel, or every second one, ... as it lies.
  bool is_pointwise() const {
    return groups == 1 && taps() == 1 && padding[0] == 0 && padding[1] == 0;
  }
  // 3x3 kernels on images of 2x2 with zeros around them.
  bool is_two_by_two() const {
    return kh == 3 && kw == 3 && h == 2 && w == 2 && oh == 2 && ow == 2 && padding[0] == 1 &&
           padding[1] == 1 && stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 &&
           dilation[1] == 1;
  }
  // Channels are so few that the direct kernels read a kernel's whole rows at a time.
  bool reads_rows() const { return groups == 1 && c < 16 && kw > 1 && dilation[1] == 1; }
};

// Weights of the first group, whose taps lie at one stride; `transposed` swaps the roles of input
// and output channels.
template <class T>
cpu::Weights<T> weights_of(const Tensor& weight, bool transposed) {
  return {data<T>(weight), weight.stride(transposed), weight.stride(weight.size(3) > 1 ? 3 : 2),
          weight.stride(!transposed), weight.size(2) * weight.size(3)};
}

// The epilogue of the neurons from `first` on.
template <class T>
cpu::Epilogue<T> from_neuron(cpu::Epilogue<T> e, int64_t first) {
  const auto advance = [&](auto*& pointer) {
    if (pointer) pointer += first;
  };
  advance(e.mask), advance(e.scale), advance(e.shift), advance(e.bias);
  advance(e.residual), advance(e.u), advance(e.active);
  return e;
}

enum class Algorithm { direct, winograd2, winograd4, torch, image };
enum class Result { output, input_grad, weight_grad };

// The algorithm that a name stands for; fails where it cannot compute this convolution. Torch's own
// is chosen by "auto" alone, for outputs and gradients of weights; that for images of few channels,
// which is a direct one, for gradients of the input alone.
Algorithm choose_algorithm(const char* op, const Conv& conv, const std::string& name,
                           ScalarType type, Result result);

// The output, from NHWC input, and the gradient of the input from that of the convolution, g, whose
// pixels are g_stride apart. Weights have their taps at one stride.
template <class T>
void direct_forward(const Conv& conv, const Tensor& weight, const T* x,
                    const cpu::Epilogue<T>& epilogue, T* y);
template <class T>
void direct_input_grad(const Conv& conv, const Tensor& weight, const T* g, int64_t g_stride,
                       const cpu::Epilogue<T>& epilogue, T* dx);

// The gradient of images of few channels, and `add`, if it is not null.
template <class T>
void image_input_grad(const Conv& conv, const Tensor& weight, const T* g, int64_t g_stride,
                      const T* add, T* dx);

// The output by torch's convolution, without an epilogue: float32, channels-last images.
Tensor torch_forward(const Conv& conv, const Tensor& weight, const Tensor& x);

// The gradient of the weights by torch, from that of its output; of `weight` only the shape counts.
Tensor torch_weight_grad(const Conv& conv, const Tensor& g, const Tensor& x, const Tensor& weight);

// The same by one of Winograd's algorithms.
template <class T>
void winograd_forward(const Conv& conv, Algorithm algorithm, const Tensor& weight, const T* x,
                      const cpu::Epilogue<T>& epilogue, T* y);
template <class T>
void winograd_input_grad(const Conv& conv, Algorithm algorithm, const Tensor& weight, const T* g,
                         int64_t g_stride, const cpu::Epilogue<T>& epilogue, T* dx);

// The gradient of the weights, [K][C / groups][kh][kw].
template <class T>
void direct_weight_grad(const Conv& conv, const T* g, int64_t g_stride, const T* x, T* dw);
template <class T>
void winograd_weight_grad(const Conv& conv, Algorithm algorithm, const T* g, int64_t g_stride,
                          const T* x, T* dw);

}  // namespace mnp::ops
