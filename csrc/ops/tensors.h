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

#include "cpu/dispatch.h"

namespace mnp::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

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

// Channels-last in memory and not contiguous as well (as with one channel or one pixel).
bool is_channels_last(const Tensor& t);

// A per-neuron vector in the compute type, contiguous; `fill` everywhere where it is not given.
Tensor neuron_vector(const char* op, const char* name, const MaybeTensor& given, int64_t neurons,
                     double fill, const Tensor& like, ScalarType type);

// The mask, (neurons,) or per sample (batch, neurons), and the stride between samples.
struct Mask {
  Tensor values;
  int64_t stride;
  Mask(const char* op, const MaybeTensor& given, int64_t batch, int64_t neurons, const Tensor& like,
       ScalarType type);
};

// Fails unless the given tensor has the shape and type of `like`.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like);

bool parse_activation(const char* op, const std::string& activation);

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

// Runs cpu::Kernels::epilogue_grad over all samples and neurons on torch's threads.
template <class T>
void run_epilogue_grad(const cpu::EpilogueGrad<T>& a);

}  // namespace mnp::ops
