// As much of CUDA as the kernels use, on the CPU: see fibers.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after another

using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Accesses of 16 bytes are counted: those of the kernels are copies of this type.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wclass-memaccess"  // to the kernels it is plain data
#endif
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  uint4(const uint4& other) : x(other.x), y(other.y), z(other.z), w(other.w) { ++shim::wide_reads; }
  uint4& operator=(const uint4&) = default;
};

inline void __stwb(uint4* p, const uint4& value) {
  *p = value;
  ++shim::wide_writes;
}

inline dim3 blockIdx;
#define threadIdx (dim3(static_cast<unsigned>(shim::thread())))

struct CUstream_st;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaErrorInvalidConfiguration; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  CUstream_st* stream;
};

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  if (config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx = dim3(shim::reversed ? config->gridDim.x - 1 - i : i);
    shim::run_block(static_cast<int>(config->blockDim.x), [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

inline void __syncthreads() { shim::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(shim::Slot));
  shim::Slot slot{};
  std::memcpy(&slot, &value, sizeof(T));
  slot = shim::exchange(lanes, slot, mask);
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}
