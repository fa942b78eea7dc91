// A convolution without the neurons whose mask is 0 for all samples.
#pragma once

#include "conv.h"

namespace mnp::ops {

struct Living {
  const Conv& whole;
  Conv conv;                     // with as many neurons as are left
  std::vector<int64_t> neurons;  // which they are, increasing; not set where all are

  // All neurons, where leaving out some does not pay.
  Living(const Conv& whole, const Mask& mask, Algorithm algorithm);

  bool all() const { return conv.k == whole.k; }
  // Their weights.
  Tensor filters(const Tensor& weight) const;
  // The output of all neurons, from u of these, [pixels][conv.k].
  template <class T>
  void expand(const T* u, const cpu::Epilogue<T>& epilogue, T* y) const;
  // In place: the gradients of these first in each pixel.
  template <class T>
  void compact(T* g, int64_t g_stride) const;
  // In place: from the gradient of their weights, that of all weights.
  template <class T>
  void expand_filters(T* dw) const;
};

}  // namespace mnp::ops
