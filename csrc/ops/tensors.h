// Checks and conversions that the operators share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_types.h"

namespace mnp::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Names = std::vector<std::string>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define MNP_CHECK(condition, ...) \
  if (!(condition)) ::mnp::ops::fail(__VA_ARGS__)

Ints sizes_of(const Tensor& t);

// "(2, 3)" as Python writes it, for messages.
std::string shape_of(const Ints& sizes);
std::string shape_of(const Tensor& t);

// float32 for half types, else the type itself; fails for others, naming the operator.
ScalarType compute_type(const char* op, const Tensor& t);

// `t` as the compute type; itself where it has that type already.
Tensor as_type(const Tensor& t, ScalarType type);

// Calls f with a value of the C++ type: f(float{}) or f(double{}).
template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

// Channels-last in memory; of what is contiguous as well (one channel or pixel), as torch has it.
bool is_channels_last(const Tensor& t);

// `t` in this layout; itself where it has it already, which torch would take longer to find out.
Tensor to_contiguous(const Tensor& t);
Tensor to_channels_last(const Tensor& t);

// A tensor (N, K, *) in a layout that the kernels know, as elements of a type.
struct Arranged {
  ScalarType type;
  Tensor x;
  NeuronLayout layout;
  bool channels_last;

  Arranged(const char* op, const Tensor& given, ScalarType type);
  // `t` in that type and layout.
  Tensor arrange(const Tensor& t) const;
};

bool same_device(const Tensor& a, const Tensor& b);

// Fails unless a per-neuron vector has shape (neurons,), and the device and dtype of `like`, or the
// dtype that is computed in.
void check_vector(const char* op, const char* name, const Tensor& given, int64_t neurons,
                  const Tensor& like, ScalarType computed);

// The same for a mask, which may also be (batch, neurons). Returns whether it is.
bool check_mask(const char* op, const Tensor& given, int64_t batch, int64_t neurons,
                const Tensor& like, ScalarType computed);

// A per-neuron vector in the compute type, contiguous, on the CPU; `fill` everywhere where it is
// not given.
Tensor neuron_vector(const char* op, const char* name, const MaybeTensor& given, int64_t neurons,
                     double fill, const Tensor& like, ScalarType type);

// The mask in such form, (neurons,) or per sample (batch, neurons), and the stride between samples.
struct Mask {
  Tensor values;
  int64_t stride;
  Mask(const char* op, const MaybeTensor& given, int64_t batch, int64_t neurons, const Tensor& like,
       ScalarType type);
};

// Fails unless the given tensor has the shape, type and device of `like`.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like);

// What mask_update_ is given: lists of one tensor a layer, all on one device.
void check_mask_lists(const char* op, const std::vector<Tensor>& masks,
                      const std::vector<Tensor>& grads, const std::vector<Tensor>& velocities,
                      const std::vector<Tensor>& magnitudes);

bool parse_activation(const char* op, const std::string& activation);
Norm parse_norm(const char* op, const std::string& norm);
Element element_of(ScalarType type);

// Whether each row of a weight, (neurons, *), lies in one piece, in whatever order of its axes.
bool has_dense_rows(const Tensor& weight);

// Smallest range worth a thread of its own, for items that cost `cost` multiply-adds each.
int64_t grain(int64_t cost);

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* data_or_null(const MaybeTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

}  // namespace mnp::ops
