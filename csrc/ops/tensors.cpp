#include "tensors.h"

#include <algorithm>

namespace mnp::ops {

Ints sizes_of(const Tensor& t) {
  Ints sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

std::string shape_of(const Ints& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string shape_of(const Tensor& t) { return shape_of(sizes_of(t)); }

ScalarType compute_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
      return t.scalar_type();
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return ScalarType::Float;
    default:
      fail(op, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 && t.dim() != 5) return false;
  if (t.is_contiguous()) return false;
  int64_t expected = 1;
  const auto matches = [&](int64_t axis) {
    const bool ok = t.size(axis) == 1 || t.stride(axis) == expected;
    expected *= t.size(axis);
    return ok;
  };
  if (!matches(1)) return false;
  for (int64_t axis = t.dim() - 1; axis > 1; --axis)
    if (!matches(axis)) return false;
  return matches(0);
}

namespace {

// The given vector of a neuron's operator, checked for device and type, as the compute type.
Tensor checked(const char* op, const char* name, const Tensor& given, const Tensor& like,
               ScalarType type) {
  MNP_CHECK(given.is_cpu(), op, ": ", name, " must be on the CPU, as the input is");
  MNP_CHECK(given.scalar_type() == like.scalar_type() || given.scalar_type() == type, op, ": ",
            name, " must have the input's dtype");
  return torch::stable::contiguous(as_type(given, type));
}

}  // namespace

Tensor neuron_vector(const char* op, const char* name, const MaybeTensor& given, int64_t neurons,
                     double fill, const Tensor& like, ScalarType type) {
  if (!given) return torch::stable::full({neurons}, fill, type);
  MNP_CHECK(given->dim() == 1 && given->size(0) == neurons, op, ": ", name, " must have shape (",
            neurons, ",), one value a neuron, not ", shape_of(*given));
  return checked(op, name, *given, like, type);
}

Mask::Mask(const char* op, const MaybeTensor& given, int64_t batch, int64_t neurons,
           const Tensor& like, ScalarType type)
    : stride(0) {
  if (!given || given->dim() != 2) {
    values = neuron_vector(op, "mask", given, neurons, 1, like, type);
    return;
  }
  MNP_CHECK(given->size(0) == batch && given->size(1) == neurons, op, ": mask must have shape (",
            neurons, ",) or, per sample, (", batch, ", ", neurons, "), not ", shape_of(*given));
  values = checked(op, "mask", *given, like, type);
  stride = neurons;
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim() && t.scalar_type() == like.scalar_type() && t.is_cpu();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  MNP_CHECK(same, op, ": ", name, " must have shape ", shape_of(like),
            " and the input's dtype and device, not shape ", shape_of(t));
}

bool parse_activation(const char* op, const std::string& activation) {
  MNP_CHECK(activation == "none" || activation == "relu", op,
            ": activation must be 'none' or 'relu', not '", activation, "'");
  return activation == "relu";
}

int64_t grain(int64_t cost) {
  constexpr int64_t kWorthAThread = 32768;
  return std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
}

template <class T>
void run_epilogue_grad(const cpu::EpilogueGrad<T>& a) {
  constexpr int64_t kNeurons = 64;
  const int64_t strips = (a.layout.neurons + kNeurons - 1) / kNeurons;
  torch::stable::parallel_for(0, a.layout.batch * strips, grain(a.layout.inner * kNeurons),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t n = i / strips, first = i % strips * kNeurons;
                                  cpu::kernels_of<T>().epilogue_grad(
                                      a, n, n + 1, first,
                                      std::min(first + kNeurons, a.layout.neurons));
                                }
                              });
}

template void run_epilogue_grad(const cpu::EpilogueGrad<float>&);
template void run_epilogue_grad(const cpu::EpilogueGrad<double>&);

}  // namespace mnp::ops
