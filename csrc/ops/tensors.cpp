#include "tensors.h"

#include <algorithm>
#include <array>

namespace mnp::ops {

namespace {

// Fails unless a neuron's values are where the input is, in its dtype or the one computed in.
void check_place(const char* op, const char* name, const Tensor& given, const Tensor& like,
                 ScalarType computed) {
  MNP_CHECK(same_device(given, like), op, ": ", name, " must be on the input's device");
  MNP_CHECK(given.scalar_type() == like.scalar_type() || given.scalar_type() == computed, op, ": ",
            name, " must have the input's dtype");
}

// Whether the channels of each pixel, and the pixels of each image, lie next to each other.
bool lies_channels_last(const Tensor& t) {
  if (t.dim() != 4 && t.dim() != 5) return false;
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

}  // namespace

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
  if (!lies_channels_last(t)) return false;
  if (!t.is_contiguous()) return true;
  // With one channel or one pixel it is both: torch goes by strides that matter to no element.
  return t.stride(1) == 1 && t.stride(t.dim() - 1) == t.size(1) && t.numel() > t.size(0);
}

Tensor to_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor to_channels_last(const Tensor& t) {
  return lies_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

Arranged::Arranged(const char* op, const Tensor& given, ScalarType type_) : type(type_) {
  MNP_CHECK(given.dim() >= 2, op, ": x must have shape (N, K, *), not ", shape_of(given));
  channels_last = is_channels_last(given);
  x = arrange(given);
  const int64_t n = x.size(0), k = x.size(1);
  int64_t inner = 1;
  for (int64_t i = 2; i < x.dim(); ++i) inner *= x.size(i);
  layout = {n, k, inner, channels_last || inner == 1};
}

Tensor Arranged::arrange(const Tensor& t) const {
  const Tensor typed = as_type(t, type);
  if (!channels_last) return to_contiguous(typed);
  return typed.dim() == 4 ? to_channels_last(typed)
                          : torch::stable::contiguous(typed, MemoryFormat::ChannelsLast3d);
}

bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

void check_vector(const char* op, const char* name, const Tensor& given, int64_t neurons,
                  const Tensor& like, ScalarType computed) {
  MNP_CHECK(given.dim() == 1 && given.size(0) == neurons, op, ": ", name, " must have shape (",
            neurons, ",), one value a neuron, not ", shape_of(given));
  check_place(op, name, given, like, computed);
}

bool check_mask(const char* op, const Tensor& given, int64_t batch, int64_t neurons,
                const Tensor& like, ScalarType computed) {
  if (given.dim() != 2) {
    check_vector(op, "mask", given, neurons, like, computed);
    return false;
  }
  MNP_CHECK(given.size(0) == batch && given.size(1) == neurons, op, ": mask must have shape (",
            neurons, ",) or, per sample, (", batch, ", ", neurons, "), not ", shape_of(given));
  check_place(op, "mask", given, like, computed);
  return true;
}

Tensor neuron_vector(const char* op, const char* name, const MaybeTensor& given, int64_t neurons,
                     double fill, const Tensor& like, ScalarType type) {
  if (!given) return torch::stable::full({neurons}, fill, type);
  check_vector(op, name, *given, neurons, like, type);
  return to_contiguous(as_type(*given, type));
}

Mask::Mask(const char* op, const MaybeTensor& given, int64_t batch, int64_t neurons,
           const Tensor& like, ScalarType type)
    : stride(0) {
  if (!given) {
    values = neuron_vector(op, "mask", given, neurons, 1, like, type);
    return;
  }
  if (check_mask(op, *given, batch, neurons, like, type)) stride = neurons;
  values = to_contiguous(as_type(*given, type));
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same =
      t.dim() == like.dim() && t.scalar_type() == like.scalar_type() && same_device(t, like);
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  MNP_CHECK(same, op, ": ", name, " must have shape ", shape_of(like),
            " and the input's dtype and device, not shape ", shape_of(t));
}

void check_mask_lists(const char* op, const std::vector<Tensor>& masks,
                      const std::vector<Tensor>& grads, const std::vector<Tensor>& velocities,
                      const std::vector<Tensor>& magnitudes) {
  MNP_CHECK(masks.size() == grads.size() && masks.size() == velocities.size() &&
                masks.size() == magnitudes.size(),
            op, ": masks, grads, velocities and magnitudes must have the same length, not ",
            masks.size(), ", ", grads.size(), ", ", velocities.size(), " and ", magnitudes.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor& mask = masks[i];
    const ScalarType type = mask.scalar_type();
    MNP_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
              ": masks must be float32 or float64");
    MNP_CHECK(same_device(mask, masks[0]), op, ": masks must be on one device");
    MNP_CHECK(mask.is_contiguous() && velocities[i].is_contiguous(), op,
              ": masks and velocities must be contiguous");
    check_like(op, "grads", grads[i], mask);
    check_like(op, "velocities", velocities[i], mask);
    check_like(op, "magnitudes", magnitudes[i], mask);
  }
}

bool parse_activation(const char* op, const std::string& activation) {
  MNP_CHECK(activation == "none" || activation == "relu", op,
            ": activation must be 'none' or 'relu', not '", activation, "'");
  return activation == "relu";
}

Norm parse_norm(const char* op, const std::string& norm) {
  MNP_CHECK(norm == "l1" || norm == "l2" || norm == "linf" || norm == "spectral", op,
            ": norm must be 'l1', 'l2', 'linf' or 'spectral', not '", norm, "'");
  return norm == "l1"     ? Norm::l1
         : norm == "l2"   ? Norm::l2
         : norm == "linf" ? Norm::linf
                          : Norm::spectral;
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    default:
      return Element::f32;
  }
}

bool has_dense_rows(const Tensor& weight) {
  std::vector<std::array<int64_t, 2>> axes;  // stride, size
  for (int64_t i = 1; i < weight.dim(); ++i)
    if (weight.size(i) != 1) axes.push_back({weight.stride(i), weight.size(i)});
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

int64_t grain(int64_t cost) {
  constexpr int64_t kWorthAThread = 32768;
  return std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
}

}  // namespace mnp::ops
