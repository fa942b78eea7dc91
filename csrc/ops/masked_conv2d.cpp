#include <algorithm>

#include "conv.h"
#include "image.h"
#include "living.h"
#include "masked_conv2d.h"
#include "passes.h"

namespace mnp::ops {
namespace {

// An image in the memory format of the one that was given.
Tensor in_format_of(const Tensor& given, const Tensor& image) {
  return is_channels_last(given) ? image : contiguous_image(image);
}

// The weight with taps at one stride, which contiguous and channels-last weights have as they are.
Tensor even_taps(const Tensor& weight) {
  const bool even = weight.size(2) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  return even ? weight : to_contiguous(weight);
}

template <class T>
bool all_ones(const Tensor& vector) {
  const T* const values = data<T>(vector);
  return std::all_of(values, values + vector.numel(), [](T value) { return value == 1; });
}

// The image that is convolved: on the CPU, in the weight's dtype.
void check_input(const char* op, const Tensor& x, const Tensor& weight) {
  MNP_CHECK(x.is_cpu() && weight.is_cpu(), op, ": x and weight must be on the CPU");
  MNP_CHECK(x.scalar_type() == weight.scalar_type(), op, ": x and weight must share a dtype");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv2d_forward(
    const Tensor& x, const Tensor& weight, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
    const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
    const std::string& activation, bool keep_u, bool keep_active, const std::string& algorithm) {
  const char* op = "masked_conv2d";
  const ScalarType type = compute_type(op, x);
  check_input(op, x, weight);
  const Conv conv(op, sizes_of(x), weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, x, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, x, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, x, type);
  const Tensor b = neuron_vector(op, "bias", bias, conv.k, 0, x, type);
  const bool relu = parse_activation(op, activation);
  const Algorithm chosen = choose_algorithm(op, conv, algorithm, type, Result::output);

  const Ints sizes{conv.n, conv.k, conv.oh, conv.ow};
  MaybeTensor r;
  if (residual) {
    MNP_CHECK(sizes_of(*residual) == sizes, op, ": residual must have the output's shape ",
              shape_of(sizes), ", not ", shape_of(*residual));
    MNP_CHECK(residual->is_cpu() && residual->scalar_type() == x.scalar_type(), op,
              ": residual must have the input's dtype and device");
    r = channels_last_image(as_type(*residual, type));
  }
  const Tensor input = channels_last_image(as_type(x, type));
  const Tensor kernel = even_taps(as_type(weight, type));
  const Living living(conv, m, chosen);
  // Where u is kept, the gradients of masks at 0 need it too.
  const bool whole = keep_u || living.all();
  MaybeTensor product;
  if (chosen == Algorithm::torch && whole) product = torch_forward(conv, kernel, input);
  if (chosen == Algorithm::torch && !whole && living.conv.k > 0)
    product = torch_forward(living.conv, living.filters(kernel), input);
  const Tensor y = product && whole && !keep_u ? *product : empty_image(sizes, type);
  const Tensor u = !keep_u ? empty({0}, type) : product ? *product : empty_image(sizes, type);
  const Tensor active =
      keep_active ? empty_image(sizes, ScalarType::Byte) : empty({0}, ScalarType::Byte);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto convolve = [&](const Conv& part, const Tensor& filters,
                              const cpu::Epilogue<T>& epilogue, T* out) {
      if (chosen == Algorithm::winograd2 || chosen == Algorithm::winograd4)
        winograd_forward(part, chosen, filters, data<T>(input), epilogue, out);
      else
        direct_forward(part, filters, data<T>(input), epilogue, out);
    };
    cpu::Epilogue<T> epilogue{};
    epilogue.mask = data<T>(m.values), epilogue.mask_stride = m.stride;
    epilogue.scale = data<T>(a), epilogue.shift = data<T>(c), epilogue.bias = data<T>(b);
    epilogue.residual = data_or_null<T>(r);
    epilogue.u = keep_u && !product ? mutable_data<T>(u) : nullptr;
    epilogue.active = keep_active ? mutable_data<uint8_t>(active) : nullptr;
    epilogue.relu = relu;
    if (product && whole)
      return run_epilogue({conv.n, conv.k, conv.oh * conv.ow, true}, epilogue, data<T>(*product),
                          mutable_data<T>(y));
    if (whole) return convolve(conv, kernel, epilogue, mutable_data<T>(y));
    const auto part = buffer<T>(product ? 0 : conv.n * conv.oh * conv.ow * living.conv.k);
    if (!product && living.conv.k > 0)
      convolve(living.conv, living.filters(kernel), {}, part.get());
    living.expand(product ? data<T>(*product) : part.get(), epilogue, mutable_data<T>(y));
  });
  return {as_type(y, x.scalar_type()), u, active};
}

std::tuple<Tensor, Tensor> masked_conv2d(const Tensor& x, const Tensor& weight,
                                         const MaybeTensor& mask, const MaybeTensor& scale,
                                         const MaybeTensor& shift, const MaybeTensor& bias,
                                         const MaybeTensor& residual, const Ints& stride,
                                         const Ints& padding, const Ints& dilation, int64_t groups,
                                         const std::string& activation, bool keep_u,
                                         const std::string& algorithm) {
  const auto [y, u, active] =
      conv2d_forward(x, weight, mask, scale, shift, bias, residual, stride, padding, dilation,
                     groups, activation, keep_u, false, algorithm);
  return {in_format_of(x, y), u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(
    const Tensor& grad, const MaybeTensor& x, const Ints& x_size, const Tensor& weight,
    const MaybeTensor& y, const MaybeTensor& active, const KnownU& known, const MaybeTensor& mask,
    const MaybeTensor& scale, const MaybeTensor& shift, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, bool need_x, bool need_weight, bool need_residual,
    bool need_sums, const std::string& algorithm, const MaybeTensor& add,
    const MaybeTensor& add_to_u) {
  const char* op = "masked_conv2d_backward";
  const ScalarType type = compute_type(op, grad);
  MNP_CHECK(grad.is_cpu() && weight.is_cpu() && grad.scalar_type() == weight.scalar_type(), op,
            ": grad must have the weight's dtype and device");
  const Conv conv(op, x_size, weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, grad, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, grad, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, grad, type);
  const Algorithm for_x = choose_algorithm(op, conv, algorithm, type, Result::input_grad);
  const Algorithm for_weight = choose_algorithm(op, conv, algorithm, type, Result::weight_grad);
  // Neurons whose mask is 0 have a gradient of u all the same where one is given.
  const Living living(conv, add_to_u ? Mask(op, std::nullopt, conv.n, conv.k, grad, type) : m,
                      for_x);
  const Ints out_sizes{conv.n, conv.k, conv.oh, conv.ow};
  MNP_CHECK(sizes_of(grad) == out_sizes, op, ": grad must have the output's shape ",
            shape_of(out_sizes), ", not ", shape_of(grad));
  MNP_CHECK(x || !need_weight, op, ": x must be given where need_weight");
  if (y) check_like(op, "y", *y, grad);
  MNP_CHECK(!active || (active->is_cpu() && active->scalar_type() == ScalarType::Byte &&
                        active->numel() == grad.numel()),
            op, ": active must be what conv2d_forward kept");
  const MaybeTensor& u = known.u;
  if (known.output) check_like(op, "output", *known.output, grad);
  if (known.residual) check_like(op, "residual", *known.residual, grad);
  MNP_CHECK(!u || (u->is_cpu() && u->scalar_type() == type && u->numel() == grad.numel()), op,
            ": u must be what masked_conv2d kept");

  const Tensor dy = channels_last_image(as_type(grad, type));
  MaybeTensor out, pre, z, b, added, more, more_of_u;
  if (y) out = channels_last_image(as_type(*y, type));
  if (known.output) {
    z = channels_last_image(as_type(*known.output, type));
    b = neuron_vector(op, "bias", known.bias, conv.k, 0, grad, type);
  }
  if (add_to_u) more_of_u = neuron_vector(op, "the gradient of u", add_to_u, conv.k, 0, grad, type);
  if (known.residual) added = channels_last_image(as_type(*known.residual, type));
  if (add && need_x) {
    MNP_CHECK(add->is_cpu() && add->scalar_type() == grad.scalar_type() && sizes_of(*add) == x_size,
              op, ": add must have x's shape ", shape_of(x_size), ", dtype and device");
    more = channels_last_image(as_type(*add, type));
  }
  if (u) pre = channels_last_image(*u);
  Tensor dres = need_residual ? empty_image(out_sizes, type) : empty({0}, type);
  Tensor dx = need_x ? empty_image(x_size, type) : empty({0}, type);
  Tensor dw =
      need_weight ? empty({conv.k, conv.group_in(), conv.kh, conv.kw}, type) : empty({0}, type);
  const bool for_torch = need_weight && for_weight == Algorithm::torch;
  const bool needs_more = need_residual || need_sums || y || active || add_to_u;
  Tensor sums = need_sums ? empty({3, conv.n, conv.k}, type) : empty({0}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    // The gradient of u: that of the output, or a new image, without gaps where torch reads it.
    const bool is_given = !needs_more && all_ones<T>(m.values) && all_ones<T>(a);
    const bool is_dense = is_given || for_torch;
    const int64_t g_stride = is_dense ? conv.k : cpu::kernels_of<T>().row_stride(conv.k);
    Tensor image = dy;
    if (for_torch && !is_given) image = empty_image(out_sizes, type);
    Buffer<T> skewed;
    if ((need_x || need_weight) && !is_dense)
      skewed = buffer<T>(conv.n * conv.oh * conv.ow * g_stride);
    T* const own = is_given ? nullptr : for_torch ? mutable_data<T>(image) : skewed.get();
    const T* const g = is_given ? data<T>(dy) : own;
    cpu::EpilogueGrad<T> e{};
    e.layout = {conv.n, conv.k, conv.oh * conv.ow, true};
    e.grad = data<T>(dy);
    e.y = data_or_null<T>(out);
    e.active = data_or_null<uint8_t>(active);
    e.u = need_sums ? data_or_null<T>(pre) : nullptr;
    e.z = need_sums ? data_or_null<T>(z) : nullptr;
    e.residual = e.z ? data_or_null<T>(added) : nullptr;
    e.mask = data<T>(m.values), e.mask_stride = m.stride;
    e.scale = data<T>(a), e.shift = data<T>(c), e.bias = data_or_null<T>(b);
    e.add_to_u = data_or_null<T>(more_of_u);
    e.dz = need_residual ? mutable_data<T>(dres) : nullptr;
    e.g = own, e.g_stride = g_stride;
    e.sums = need_sums ? mutable_data<T>(sums) : nullptr;
    if (!is_given) run_epilogue_grad(e);
    if (own) living.compact(own, g_stride);
    if (need_x) {
      const Tensor kernel = living.filters(even_taps(as_type(weight, type)));
      cpu::Epilogue<T> sum{};
      sum.residual = data_or_null<T>(more);
      if (for_x == Algorithm::direct || living.conv.k == 0)
        direct_input_grad(living.conv, kernel, g, g_stride, sum, mutable_data<T>(dx));
      else if (for_x == Algorithm::image)
        image_input_grad(living.conv, kernel, g, g_stride, sum.residual, mutable_data<T>(dx));
      else
        winograd_input_grad(living.conv, for_x, kernel, g, g_stride, sum, mutable_data<T>(dx));
    }
    if (need_weight) {
      const Tensor input = channels_last_image(as_type(*x, type));
      if (for_weight == Algorithm::direct || living.conv.k == 0)
        direct_weight_grad(living.conv, g, g_stride, data<T>(input), mutable_data<T>(dw));
      else if (for_torch) {
        const Tensor part =
            torch_weight_grad(living.conv, torch::stable::narrow(image, 1, 0, living.conv.k), input,
                              torch::stable::narrow(dw, 0, 0, living.conv.k));
        std::copy_n(data<T>(part), part.numel(), mutable_data<T>(dw));
      } else
        winograd_weight_grad(living.conv, for_weight, g, g_stride, data<T>(input),
                             mutable_data<T>(dw));
      living.expand_filters(mutable_data<T>(dw));
    }
  });
  return {as_type(dx, grad.scalar_type()), as_type(dw, grad.scalar_type()),
          as_type(dres, grad.scalar_type()), sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& y,
    const MaybeTensor& u, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, bool need_x, bool need_weight, bool need_residual, bool need_sums,
    const std::string& algorithm) {
  check_input("masked_conv2d_backward", x, weight);
  const auto [dx, dw, dres, sums] =
      conv2d_backward(grad, x, sizes_of(x), weight, y, std::nullopt, {u}, mask, scale, shift,
                      stride, padding, dilation, groups, need_x, need_weight, need_residual,
                      need_sums, algorithm, std::nullopt, std::nullopt);
  return {need_x ? in_format_of(x, dx) : dx, dw, need_residual ? in_format_of(x, dres) : dres,
          sums};
}

}  // namespace mnp::ops
