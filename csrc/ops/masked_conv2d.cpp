#include <algorithm>

#include "conv.h"
#include "image.h"
#include "living.h"

namespace mnp::ops {
namespace {

Tensor to_channels_last(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(as_type(t, type), MemoryFormat::ChannelsLast);
}

// `t` in the input's dtype and memory format.
Tensor as_given(const Tensor& t, const Tensor& input) {
  const Tensor typed = as_type(t, input.scalar_type());
  return is_channels_last(input) ? typed : torch::stable::contiguous(typed);
}

Tensor empty(const Ints& sizes, ScalarType type) {
  return torch::stable::empty({sizes.data(), sizes.size()}, type);
}

// The weight with taps at one stride, which contiguous and channels-last weights have as they are.
Tensor even_taps(const Tensor& weight) {
  const bool even = weight.size(2) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  return even ? weight : torch::stable::contiguous(weight);
}

// The algorithm that a name stands for where an image of rows x cols is to be computed from `depth`
// channels; fails where it cannot compute this convolution.
Algorithm choose_algorithm(const char* op, const Conv& conv, const std::string& name,
                           ScalarType type, int64_t rows, int64_t cols, int64_t depth) {
  MNP_CHECK(name == "auto" || name == "direct" || name == "winograd2" || name == "winograd4", op,
            ": algorithm must be 'auto', 'direct', 'winograd2' or 'winograd4', not '", name, "'");
  const auto both = [](const int64_t* v, int64_t value) { return v[0] == value && v[1] == value; };
  const bool possible = conv.kh == 3 && conv.kw == 3 && both(conv.stride, 1) &&
                        both(conv.dilation, 1) && conv.groups == 1;
  MNP_CHECK(possible || name == "auto" || name == "direct", op, ": algorithm '", name,
            "' needs a 3x3 kernel with stride 1, dilation 1 and groups 1, not ", conv.kh, "x",
            conv.kw, ", stride ", conv.stride[0], "x", conv.stride[1], ", dilation ",
            conv.dilation[0], "x", conv.dilation[1], " and groups ", conv.groups);
  if (name == "winograd2") return Algorithm::winograd2;
  if (name == "winograd4") return Algorithm::winograd4;
  // Where F(4x4, 3x3) was no slower, measured with one thread on AVX2.
  const int64_t tiles = conv.n * ((rows + 3) / 4) * ((cols + 3) / 4);
  const bool faster =
      type == ScalarType::Float && depth >= 8 && tiles >= 8 && conv.n * rows * cols >= 10 * tiles;
  return name == "auto" && possible && faster ? Algorithm::winograd4 : Algorithm::direct;
}

}  // namespace

std::tuple<Tensor, Tensor> masked_conv2d(const Tensor& x, const Tensor& weight,
                                         const MaybeTensor& mask, const MaybeTensor& scale,
                                         const MaybeTensor& shift, const MaybeTensor& bias,
                                         const MaybeTensor& residual, const Ints& stride,
                                         const Ints& padding, const Ints& dilation, int64_t groups,
                                         const std::string& activation, bool keep_u,
                                         const std::string& algorithm) {
  const char* op = "masked_conv2d";
  const ScalarType type = compute_type(op, x);
  const Conv conv(op, x, weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, x, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, x, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, x, type);
  const Tensor b = neuron_vector(op, "bias", bias, conv.k, 0, x, type);
  const bool relu = parse_activation(op, activation);
  const Algorithm chosen = choose_algorithm(op, conv, algorithm, type, conv.oh, conv.ow, conv.c);

  const Ints sizes{conv.n, conv.k, conv.oh, conv.ow};
  Tensor y = empty_image(sizes, type);
  Tensor u = keep_u ? empty_image(sizes, type) : empty({0}, type);
  MaybeTensor r;
  if (residual) {
    MNP_CHECK(residual->dim() == 4 && residual->size(0) == conv.n && residual->size(1) == conv.k &&
                  residual->size(2) == conv.oh && residual->size(3) == conv.ow,
              op, ": residual must have the output's shape ", shape_of(y), ", not ",
              shape_of(*residual));
    MNP_CHECK(residual->is_cpu() && residual->scalar_type() == x.scalar_type(), op,
              ": residual must have the input's dtype and device");
    r = to_channels_last(*residual, type);
  }
  const Tensor input = to_channels_last(x, type);
  const Tensor kernel = even_taps(as_type(weight, type));
  const Living living(conv, m, chosen);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto convolve = [&](const Conv& part, const Tensor& filters,
                              const cpu::Epilogue<T>& epilogue, T* out) {
      if (chosen == Algorithm::direct)
        direct_forward(part, filters, data<T>(input), epilogue, out);
      else
        winograd_forward(part, chosen, filters, data<T>(input), epilogue, out);
    };
    const cpu::Epilogue<T> epilogue{data<T>(m.values),
                                    m.stride,
                                    data<T>(a),
                                    data<T>(c),
                                    data<T>(b),
                                    data_or_null<T>(r),
                                    keep_u ? mutable_data<T>(u) : nullptr,
                                    relu};
    // Where u is kept, the gradients of masks at 0 need it too.
    if (keep_u || living.all()) return convolve(conv, kernel, epilogue, mutable_data<T>(y));
    const auto part = buffer<T>(conv.n * conv.oh * conv.ow * living.conv.k);
    if (living.conv.k > 0) convolve(living.conv, living.filters(kernel), {}, part.get());
    living.expand(part.get(), epilogue, mutable_data<T>(y));
  });
  return {as_given(y, x), u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& y,
    const MaybeTensor& u, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, bool need_x, bool need_weight, bool need_residual, bool need_sums,
    const std::string& algorithm, const MaybeTensor& add) {
  const char* op = "masked_conv2d_backward";
  const ScalarType type = compute_type(op, x);
  const Conv conv(op, x, weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, x, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, x, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, x, type);
  const Algorithm chosen = choose_algorithm(op, conv, algorithm, type, conv.h, conv.w, conv.k);
  const Living living(conv, m, chosen);
  MNP_CHECK(grad.dim() == 4 && grad.size(0) == conv.n && grad.size(1) == conv.k &&
                grad.size(2) == conv.oh && grad.size(3) == conv.ow,
            op, ": grad must have the output's shape, not ", shape_of(grad));
  MNP_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type(), op,
            ": grad must have the input's dtype and device");
  if (y) check_like(op, "y", *y, grad);
  MNP_CHECK(!u || (u->is_cpu() && u->scalar_type() == type && u->numel() == grad.numel()), op,
            ": u must be what masked_conv2d kept");

  const Tensor dy = to_channels_last(grad, type);
  MaybeTensor out, pre, more;
  if (y) out = to_channels_last(*y, type);
  if (add && need_x) {
    check_like(op, "add", *add, x);
    more = to_channels_last(*add, type);
  }
  if (u) pre = torch::stable::contiguous(*u, MemoryFormat::ChannelsLast);
  const Ints out_sizes{conv.n, conv.k, conv.oh, conv.ow};
  Tensor dres = need_residual ? empty_image(out_sizes, type) : empty({0}, type);
  Tensor dx = need_x ? empty_image({conv.n, conv.c, conv.h, conv.w}, type) : empty({0}, type);
  Tensor dw =
      need_weight ? empty({conv.k, conv.group_in(), conv.kh, conv.kw}, type) : empty({0}, type);
  Tensor sums = need_sums ? empty({3, conv.n, conv.k}, type) : empty({0}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> g;
    const int64_t g_stride = cpu::kernels_of<T>().row_stride(conv.k);
    if (need_x || need_weight) g = buffer<T>(conv.n * conv.oh * conv.ow * g_stride);
    cpu::EpilogueGrad<T> e{};
    e.layout = {conv.n, conv.k, conv.oh * conv.ow, true};
    e.grad = data<T>(dy);
    e.y = data_or_null<T>(out);
    e.u = need_sums ? data_or_null<T>(pre) : nullptr;
    e.mask = data<T>(m.values), e.mask_stride = m.stride;
    e.scale = data<T>(a), e.shift = data<T>(c);
    e.dz = need_residual ? mutable_data<T>(dres) : nullptr;
    e.g = g.get(), e.g_stride = g_stride;
    e.sums = need_sums ? mutable_data<T>(sums) : nullptr;
    run_epilogue_grad(e);
    if (g) living.compact(g.get(), g_stride);
    if (need_x) {
      const Tensor kernel = living.filters(even_taps(as_type(weight, type)));
      cpu::Epilogue<T> sum{};
      sum.residual = data_or_null<T>(more);
      if (chosen == Algorithm::direct || living.conv.k == 0)
        direct_input_grad(living.conv, kernel, g.get(), g_stride, sum, mutable_data<T>(dx));
      else
        winograd_input_grad(living.conv, chosen, kernel, g.get(), g_stride, sum,
                            mutable_data<T>(dx));
    }
    if (need_weight) {
      const Tensor input = to_channels_last(x, type);
      weight_grad(living.conv, g.get(), g_stride, data<T>(input), mutable_data<T>(dw));
      living.expand_filters(mutable_data<T>(dw));
    }
  });
  return {need_x ? as_given(dx, x) : dx, need_weight ? as_type(dw, x.scalar_type()) : dw,
          need_residual ? as_given(dres, x) : dres, sums};
}

}  // namespace mnp::ops
