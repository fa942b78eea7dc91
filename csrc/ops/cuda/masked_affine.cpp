#include "ops.h"

namespace mnp::ops::cuda_ops {
namespace {

// A neuron's values as the kernels read them: as they are given, without a conversion.
struct Values {
  MaybeTensor tensor;
  cuda::PerNeuron view{};

  Values(const MaybeTensor& given, ScalarType element) {
    if (!given) return;
    tensor = torch::stable::contiguous(*given);
    view = {tensor->const_data_ptr(), given->scalar_type() != element};
  }
};

const void* pointer(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace

Tensor masked_affine(const Tensor& x, const MaybeTensor& mask, const MaybeTensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& bias, const MaybeTensor& residual,
                     const std::string& activation) {
  const char* op = "masked_affine";
  const ScalarType element = x.scalar_type(), computed = compute_type(op, x);
  const Arranged plan(op, x, element);
  cuda::Epilogue e{};
  e.layout = plan.layout;
  e.element = element_of(element);
  e.relu = parse_activation(op, activation);
  if (mask) e.per_sample = check_mask(op, *mask, e.layout.batch, e.layout.neurons, x, computed);
  const auto values = [&](const char* name, const MaybeTensor& given) {
    if (given) check_vector(op, name, *given, e.layout.neurons, x, computed);
    return Values(given, element);
  };
  const Values m(mask, element), a = values("scale", scale), c = values("shift", shift),
                                 b = values("bias", bias);
  e.mask = m.view, e.scale = a.view, e.shift = c.view, e.bias = b.view;
  MaybeTensor r;
  if (residual) {
    check_like(op, "residual", *residual, x);
    r = plan.arrange(*residual);
  }
  e.u = plan.x.const_data_ptr();
  e.residual = pointer(r);
  Tensor y = torch::stable::empty_like(plan.x);
  e.y = y.mutable_data_ptr();
  check_launch(op, cuda::epilogue(e, OnDeviceOf(x).stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> masked_affine_backward(const Tensor& grad, const Tensor& x,
                                                          const MaybeTensor& y,
                                                          const MaybeTensor& mask,
                                                          const MaybeTensor& scale,
                                                          const MaybeTensor& shift, bool need_x,
                                                          bool need_residual, bool need_sums) {
  const char* op = "masked_affine_backward";
  const ScalarType element = x.scalar_type(), computed = compute_type(op, x);
  const Arranged plan(op, x, element);
  cuda::EpilogueGrad e{};
  e.layout = plan.layout;
  e.element = element_of(element);
  const int64_t batch = e.layout.batch, neurons = e.layout.neurons;
  if (mask) e.per_sample = check_mask(op, *mask, batch, neurons, x, computed);
  if (scale) check_vector(op, "scale", *scale, neurons, x, computed);
  if (shift) check_vector(op, "shift", *shift, neurons, x, computed);
  const Values m(mask, element), a(scale, element), c(shift, element);
  e.mask = m.view, e.scale = a.view, e.shift = c.view;
  check_like(op, "grad", grad, x);
  if (y) check_like(op, "y", *y, x);
  const Tensor dy = plan.arrange(grad);
  MaybeTensor out;
  if (y) out = plan.arrange(*y);
  e.grad = dy.const_data_ptr(), e.y = pointer(out), e.u = plan.x.const_data_ptr();
  const auto output = [&](bool needed) {
    return needed ? torch::stable::empty_like(plan.x) : empty_on(x, {0}, element);
  };
  Tensor dx = output(need_x), dz = output(need_residual);
  Tensor sums = empty_on(x, need_sums ? Ints{3, batch, neurons} : Ints{0}, computed);
  if (need_x) e.g = dx.mutable_data_ptr();
  if (need_residual) e.dz = dz.mutable_data_ptr();
  if (need_sums) e.sums = sums.mutable_data_ptr();
  const Tensor workspace = empty_on(x, {cuda::epilogue_grad_workspace(e)}, ScalarType::Byte);
  e.workspace = workspace.mutable_data_ptr();
  if (need_sums && plan.x.numel() == 0) torch::stable::zero_(sums);
  check_launch(op, cuda::epilogue_grad(e, OnDeviceOf(x).stream()));
  return {dx, dz, sums};
}

}  // namespace mnp::ops::cuda_ops
