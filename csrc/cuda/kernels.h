// The CUDA kernels: raw pointers to device memory and sizes only, neither torch nor CUDA here.
//
// Every function puts its work on a stream and returns at once: null, or what went wrong. Elements
// are of any floating-point type; half types are computed and summed in float32.
#pragma once

#include <stdint.h>

#include "../kernel_types.h"

struct CUstream_st;

namespace mnp::cuda {

using Stream = CUstream_st*;
using Error = const char*;

// One value a neuron, [K]. Null data stands for values that change nothing.
struct PerNeuron {
  const void* data;
  bool computed;  // in the type that is computed in, not in that of the elements
};

struct Epilogue {
  NeuronLayout layout;
  Element element;
  const void* u;
  PerNeuron mask;   // or [N][K]
  bool per_sample;  // whether it is
  PerNeuron scale, shift, bias;
  const void* residual;  // or null
  bool relu;
  void* y;
};

// y = act(mask * (scale * u + shift) + bias + residual).
Error epilogue(const Epilogue& e, Stream stream);

// Outputs may be null.
struct EpilogueGrad {
  NeuronLayout layout;
  Element element;
  const void* grad;
  const void* y;  // the forward's output where a ReLU made it, or null
  const void* u;  // read for sums only
  PerNeuron mask;
  bool per_sample;
  PerNeuron scale, shift;
  void* dz;    // grad * act'(z)
  void* g;     // dz * mask * scale
  void* sums;  // [3][N][K] of dz, dz * (scale * u + shift), dz * u, in the type computed in
  void* workspace;
};

// Bytes of workspace that the sums need.
int64_t epilogue_grad_workspace(const EpilogueGrad& e);
Error epilogue_grad(const EpilogueGrad& e, Stream stream);

// The weights of one layer's neurons, and where their norms go.
struct NeuronRows {
  const void* weights;
  int64_t neurons;
  int64_t size;    // elements of a neuron, side by side
  int64_t stride;  // elements from a neuron to the next
  void* norms;     // [neurons], in the type computed in
};

Error magnitude(const NeuronRows* layers, int64_t count, Element element, Norm norm, Stream stream);

// One layer's masks: velocity = momentum * velocity + grad + penalty * magnitude;
// mask = clamp(mask - lr * velocity, 0, 1).
struct MaskStep {
  void* mask;
  const void* grad;
  void* velocity;
  const void* magnitude;
  int64_t size;
};

// `element` is float32 or float64.
Error mask_update(const MaskStep* layers, int64_t count, Element element, double lr,
                  double momentum, double penalty, Stream stream);

}  // namespace mnp::cuda
