// What the kernels of all devices have in common.
#pragma once

#include <stdint.h>

namespace mnp {

// Elements (n, k, i) of a tensor with `inner` elements per neuron and sample:
// channels_last: at (n * inner + i) * K + k; otherwise at (n * K + k) * inner + i.
struct NeuronLayout {
  int64_t batch, neurons, inner;
  bool channels_last;
};

enum class Norm : int { l1, l2, linf, spectral };
enum class Element : int { f32, f64, f16, bf16 };

}  // namespace mnp
