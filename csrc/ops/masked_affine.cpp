#include "image.h"
#include "ops.h"
#include "passes.h"

namespace mnp::ops {
namespace {

Arranged on_cpu(const char* op, const Tensor& x) {
  MNP_CHECK(x.is_cpu(), op, ": x must be on the CPU");
  return Arranged(op, x, compute_type(op, x));
}

}  // namespace

Tensor masked_affine(const Tensor& x, const MaybeTensor& mask, const MaybeTensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
                     const std::string& activation) {
  const char* op = "masked_affine";
  const Arranged plan = on_cpu(op, x);
  const NeuronLayout& layout = plan.layout;
  const Mask m(op, mask, layout.batch, layout.neurons, x, plan.type);
  const Tensor a = neuron_vector(op, "scale", scale, layout.neurons, 1, x, plan.type);
  const Tensor c = neuron_vector(op, "shift", shift, layout.neurons, 0, x, plan.type);
  const Tensor b = neuron_vector(op, "bias", bias, layout.neurons, 0, x, plan.type);
  const bool relu = parse_activation(op, activation);
  MaybeTensor r;
  if (residual) {
    check_like(op, "residual", *residual, x);
    r = plan.arrange(*residual);
  }
  Tensor y = empty_as(plan.x);
  with_type(plan.type, [&](auto zero) {
    using T = decltype(zero);
    cpu::Epilogue<T> e{};
    e.mask = data<T>(m.values), e.mask_stride = m.stride;
    e.scale = data<T>(a), e.shift = data<T>(c), e.bias = data<T>(b);
    e.residual = data_or_null<T>(r);
    e.relu = relu;
    run_epilogue(layout, e, data<T>(plan.x), mutable_data<T>(y));
  });
  return as_type(y, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> masked_affine_backward(const Tensor& grad, const Tensor& x,
                                                          const MaybeTensor& y,
                                                          const MaybeTensor& mask,
                                                          const MaybeTensor& scale,
                                                          const MaybeTensor& shift, bool need_x,
                                                          bool need_residual, bool need_sums) {
  const char* op = "masked_affine_backward";
  const Arranged plan = on_cpu(op, x);
  const NeuronLayout& layout = plan.layout;
  const Mask m(op, mask, layout.batch, layout.neurons, x, plan.type);
  const Tensor a = neuron_vector(op, "scale", scale, layout.neurons, 1, x, plan.type);
  const Tensor c = neuron_vector(op, "shift", shift, layout.neurons, 0, x, plan.type);
  check_like(op, "grad", grad, x);
  if (y) check_like(op, "y", *y, x);
  const Tensor dy = plan.arrange(grad);
  MaybeTensor out;
  if (y) out = plan.arrange(*y);
  const auto output = [&](bool needed) {
    return needed ? empty_as(plan.x) : empty({0}, plan.type);
  };
  Tensor dx = output(need_x), dres = output(need_residual);
  Tensor sums =
      need_sums ? empty({3, layout.batch, layout.neurons}, plan.type) : empty({0}, plan.type);
  with_type(plan.type, [&](auto zero) {
    using T = decltype(zero);
    cpu::EpilogueGrad<T> e{};
    e.layout = layout;
    e.grad = data<T>(dy);
    e.y = data_or_null<T>(out);
    e.u = need_sums ? data<T>(plan.x) : nullptr;
    e.mask = data<T>(m.values), e.mask_stride = m.stride;
    e.scale = data<T>(a), e.shift = data<T>(c);
    e.dz = need_residual ? mutable_data<T>(dres) : nullptr;
    e.g = need_x ? mutable_data<T>(dx) : nullptr;
    e.g_stride = layout.neurons;
    e.sums = need_sums ? mutable_data<T>(sums) : nullptr;
    run_epilogue_grad(e);
  });
  return {as_type(dx, x.scalar_type()), as_type(dres, x.scalar_type()), sums};
}

}  // namespace mnp::ops
