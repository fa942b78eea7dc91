// The epilogue where only some neurons were computed. Included once per instruction set; see
// isa.inl.
#pragma once

// Pixels that are spread before any of them becomes an output: a vector load right behind the
// scalar stores would wait for them.
constexpr int64_t kSpread = 4;

template <class T>
int64_t expand_scratch(int64_t neurons) {
  return kSpread * skewed<T>(neurons);
}

template <class T>
void expand_neurons(const ExpandNeurons<T>& a, int64_t begin, int64_t end, T* scratch) {
  const int64_t neurons = a.layout.neurons, stride = skewed<T>(neurons);
  clear(kSpread * stride, scratch);
  for (int64_t p = begin; p < end; p += kSpread) {
    const int64_t pixels = min(kSpread, end - p);
    for (int64_t s = 0; s < pixels; ++s) {
      const T* u = a.u + (p + s) * a.count;
      T* spread = scratch + s * stride;
      for (int64_t i = 0; i < a.count; ++i) spread[a.living[i]] = u[i];
    }
    for (int64_t s = 0; s < pixels; ++s)
      write_pixel(a.epilogue, scratch + s * stride, (p + s) / a.layout.inner, 0, neurons, a.output,
                  (p + s) * neurons);
  }
}
