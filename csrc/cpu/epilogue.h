// What turns a product into an output. Included once per instruction set; see isa.inl.
#pragma once

// One vector of neurons [first, first + count) of a sample, of which `count` exist.
template <class T>
struct OutputLane {
  const Epilogue<T>* e;
  Vec<T> mask, scale, shift, bias;
  int64_t count;
  OutputLane(const Epilogue<T>* epilogue, int64_t sample, int64_t first, int64_t used)
      : e(epilogue), count(used) {
    if (!e || !e->mask) return;
    mask = load_some<T>(e->mask + sample * e->mask_stride + first, count);
    scale = load_some<T>(e->scale + first, count);
    shift = load_some<T>(e->shift + first, count);
    bias = load_some<T>(e->bias + first, count);
  }
  // Writes at `element` of the image; without an epilogue u itself.
  void write(T* output, int64_t element, Vec<T> u) const {
    if (e) {
      if (e->u) store_some<T>(e->u + element, u, count);
      if (e->mask) u = mask * (scale * u + shift) + bias;
      if (e->residual) u += load_some<T>(e->residual + element, count);
      if (e->relu) u = u < T(0) ? Vec<T>{} : u;
    }
    store_some<T>(output + element, u, count);
  }
};

// Neurons [first, first + count) of one pixel, whose u is given.
template <class T>
inline void write_pixel(const Epilogue<T>* e, const T* u, int64_t sample, int64_t first,
                        int64_t count, T* output, int64_t element) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t j = 0; j < count; j += L) {
    const int64_t used = min(L, count - j);
    OutputLane<T>(e, sample, first + j, used).write(output, element + j, load_some<T>(u + j, used));
  }
}
