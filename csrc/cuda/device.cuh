// What the kernels share: types, accesses of 16 bytes, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace mnp::cuda {

constexpr int kThreads = 256;  // in a block, at most
constexpr int kWarp = 32;

// The type that elements of type T are computed and summed in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, __half& to) { to = __float2half(v); }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16(v); }

// V neighbouring elements, one or as many as 16 bytes have.
template <class T, int V>
struct alignas(V * sizeof(T)) Vec {
  T at[V];
};

template <class T>
constexpr int kLanes = 16 / sizeof(T);

template <class T, int V>
__device__ inline Vec<T, V> load(const T* p) {
  if constexpr (V == 1) {
    return {*p};
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    Vec<T, V> v;
    static_assert(sizeof v == sizeof bits);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
}
template <class T, int V>
__device__ inline void store(T* p, const Vec<T, V>& v) {
  if constexpr (V == 1) {
    *p = v.at[0];
  } else {
    uint4 bits;
    static_assert(sizeof v == sizeof bits);
    memcpy(&bits, &v, sizeof v);
    __stwb(reinterpret_cast<uint4*>(p), bits);  // a plain store may be split by the compiler
  }
}

// Which of the elements [i, i + V) lie in [begin, end): those at the borders are accessed alone.
struct Span {
  int64_t begin, end;
  template <int V>
  __device__ bool covers(int64_t i) const {
    return i >= begin && i + V <= end;
  }
  __device__ bool has(int64_t i) const { return i >= begin && i < end; }
};

// Where all that is accessed lies inside.
struct Inside {
  template <int V>
  __device__ bool covers(int64_t) const {
    return true;
  }
  __device__ bool has(int64_t) const { return true; }
};

template <class T, int V, class Range>
__device__ inline Vec<T, V> load(const T* p, int64_t i, const Range& range) {
  if (range.template covers<V>(i)) return load<T, V>(p + i);
  Vec<T, V> v{};
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (range.has(i + j)) v.at[j] = p[i + j];
  return v;
}
template <class T, int V, class Range>
__device__ inline void store(T* p, int64_t i, const Range& range, const Vec<T, V>& v) {
  if (range.template covers<V>(i)) return store<T, V>(p + i, v);
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (range.has(i + j)) p[i + j] = v.at[j];
}

// What indices are divided by. The compiler's own division of 64 bits is a call, for which kernels
// spill registers.
struct Divisor {
  int64_t value;
  double inverse;

  explicit Divisor(int64_t v) : value(v), inverse(1.0 / static_cast<double>(v)) {}
};

// a / b for a from 0 to 2**52; integers of 32 bits are several times faster.
__device__ inline int64_t divide(int64_t a, const Divisor& b) {
  if (!((a | b.value) >> 32)) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b.value);
  const int64_t near =
      static_cast<int64_t>(static_cast<double>(a) * b.inverse);  // off by at most 1
  const int64_t rest = a - near * b.value;
  return near + (rest >= b.value) - (rest < 0);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The k-th of a neuron's values, or `missing` where there are none.
template <class T>
__device__ inline Compute<T> value(const PerNeuron& v, int64_t k, Compute<T> missing) {
  if (!v.data) return missing;
  if (v.computed) return static_cast<const Compute<T>*>(v.data)[k];
  return widen(static_cast<const T*>(v.data)[k]);
}

// The lane's part of a sum over `lanes` neighbours, a power of two up to a warp, added in one
// order.
template <class C>
__device__ inline C sum_lanes(C v, int lanes) {
  for (int step = 1; step < lanes; step *= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class F>
Error with_element(Element element, const F& f) {
  switch (element) {
    case Element::f64:
      return f(double{});
    case Element::f16:
      return f(__half{});
    case Element::bf16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Whether accesses of 16 bytes may start where the pointers point; null may be anything.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, Stream stream,
             const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the tensor has too many elements for one launch";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  if (cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess) return nullptr;
  return cudaGetErrorString(cudaGetLastError());  // and the next caller finds no error of ours
}

}  // namespace mnp::cuda
