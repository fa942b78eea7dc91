// The table of operators and the Python module _C, which tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "ops/ops.h"
#include "ops/packed.h"
#include "ops/workspace.h"

STABLE_TORCH_LIBRARY(mnp_fast, m) {
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? mask, Tensor? scale, Tensor? shift, "
      "Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "str activation, bool keep_u, str algorithm=\"auto\") -> (Tensor y, Tensor u)");
  m.def(
      "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? y, Tensor? u, "
      "Tensor? mask, Tensor? scale, Tensor? shift, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool need_x, bool need_weight, bool need_residual, bool need_sums, "
      "str algorithm=\"auto\") -> (Tensor x, Tensor weight, Tensor residual, Tensor sums)");
  m.def(
      "region_forward(Tensor[] inputs, Tensor[] parts, int[] plan, float[] eps, "
      "str[] algorithms, int[] outputs, int[] needed) -> Tensor[]");
  m.def(
      "region_backward(Tensor?[] grads, Tensor[] kept, Tensor[] parts, int[] plan, float[] eps, "
      "str[] algorithms, int[] outputs, int[] needed, int[] sizes) -> Tensor[]");
  m.def(
      "masked_affine(Tensor x, Tensor? mask, Tensor? scale, Tensor? shift, Tensor? bias, "
      "Tensor? residual, str activation) -> Tensor");
  m.def(
      "masked_affine_backward(Tensor grad, Tensor x, Tensor? y, Tensor? mask, Tensor? scale, "
      "Tensor? shift, bool need_x, bool need_residual, bool need_sums) "
      "-> (Tensor x, Tensor residual, Tensor sums)");
  m.def("neuron_magnitude(Tensor[] weights, str norm) -> Tensor[]");
  m.def(
      "mask_update_(Tensor(a!)[] masks, Tensor[] grads, Tensor(b!)[] velocities, "
      "Tensor[] magnitudes, float lr, float momentum, float penalty) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&mnp::ops::masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&mnp::ops::masked_conv2d_backward));
  m.impl("region_forward", TORCH_BOX(&mnp::ops::region_forward));
  m.impl("region_backward", TORCH_BOX(&mnp::ops::region_backward));
  m.impl("masked_affine", TORCH_BOX(&mnp::ops::masked_affine));
  m.impl("masked_affine_backward", TORCH_BOX(&mnp::ops::masked_affine_backward));
  m.impl("neuron_magnitude", TORCH_BOX(&mnp::ops::neuron_magnitude));
  m.impl("mask_update_", TORCH_BOX(&mnp::ops::mask_update_));
}

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = MNP_COMPILER;
  m.attr("built_with_torch") = MNP_TORCH_VERSION;
  m.attr("cuda_left_out") = MNP_CUDA_LEFT_OUT;  // why there is no _cuda.so; empty where there is
  m.attr("instruction_sets_built") = mnp::cpu::built_instruction_sets();
  m.attr("instruction_sets_usable") = mnp::cpu::usable_instruction_sets();
  m.attr("instruction_set") = mnp::cpu::kernels().name;
  m.def("set_memory_budget", &mnp::ops::set_memory_budget);
  m.def("freeze_weights", &mnp::ops::freeze_weights);
  m.def("weights_are_frozen", &mnp::ops::weights_are_frozen);
  m.def("forget_weights", &mnp::ops::forget_weights);
  m.def("thaw_weights", &mnp::ops::thaw_weights);
  m.def("memory_budget", &mnp::ops::memory_budget);
}
