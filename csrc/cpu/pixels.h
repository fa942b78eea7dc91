// Where the pixels of a convolution are read and written. Included once per instruction set; see
// isa.inl.
#pragma once

// Where a grid pixel reads and writes.
struct GridPixel {
  int64_t n, i, j;
  GridPixel(int64_t p, int64_t rows, int64_t cols)
      : n(p / (rows * cols)), i(p / cols % rows), j(p % cols) {}
};

// The input pixel under one tap of a grid pixel, or null outside the image.
template <class T>
inline const T* under_tap(const T* input, int64_t in_h, int64_t in_w, int64_t stride, int64_t n,
                          int64_t h, int64_t w) {
  if (h < 0 || h >= in_h || w < 0 || w >= in_w) return nullptr;
  return input + ((n * in_h + h) * in_w + w) * stride;
}

template <class T>
inline void copy(const T* from, int64_t count, T* to) {
  constexpr int64_t L = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T>(to + i, load<T>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

template <class T>
inline void clear(int64_t count, T* to) {
  constexpr int64_t L = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T>(to + i, Vec<T>{});
  for (; i < count; ++i) to[i] = 0;
}

// Where a grid pixel is written.
struct Place {
  int64_t sample, element;
};

// Memory of one call: what is read outside the image, a chunk's places, and sums of parts.
template <class T>
struct DirectScratch {
  T *sums, *zeros;
  const T** reads;  // [taps][pixels]
  Place* places;    // [pixels]
  DirectScratch(const Direct<T>& a, int64_t pixels, char* memory)
      : sums(reinterpret_cast<T*>(memory + bytes(a, pixels, 0))),
        zeros(reinterpret_cast<T*>(memory)),
        reads(reinterpret_cast<const T**>(zeros + zeros_size(a))),
        places(reinterpret_cast<Place*>(reads + a.taps * pixels)) {
    clear(a.groups * a.depth, zeros);
  }
  static int64_t zeros_size(const Direct<T>& a) { return skewed<T>(a.groups * a.depth); }
  static int64_t bytes(const Direct<T>& a, int64_t pixels, int64_t sums) {
    const int64_t elements = zeros_size(a) + sums, size = sizeof(T), pointer = sizeof(T*);
    const int64_t all = elements * size + pixels * (a.taps * pointer + int64_t(sizeof(Place)));
    return (all + 63) / 64 * 64;
  }
};

// How many multiples of `step`, from 0 on and at most `most`, lie below `end`.
inline int64_t steps_to(int64_t end, int64_t step, int64_t most) {
  return end <= 0 ? 0 : min(most, (end + step - 1) / step);
}

template <class T>
inline void find_pixels(const Direct<T>& a, int64_t begin, int64_t pixels,
                        const DirectScratch<T>& to) {
  for (int64_t s = 0; s < pixels;) {
    const GridPixel p(begin + s, a.rows, a.cols);
    const int64_t row = min(pixels - s, a.cols - p.j);
    for (int64_t q = 0; q < a.taps; ++q) {
      const int64_t h = p.i * a.step_h + a.tap_h[q], w = p.j * a.step_w + a.tap_w[q];
      const T** reads = to.reads + q * pixels + s;
      if (h < 0 || h >= a.in_h) {
        for (int64_t k = 0; k < row; ++k) reads[k] = to.zeros;
        continue;
      }
      const int64_t left = steps_to(-w, a.step_w, row), right = steps_to(a.in_w - w, a.step_w, row);
      const T* line = a.input + (p.n * a.in_h + h) * a.in_w * a.in_stride;
      for (int64_t k = 0; k < left; ++k) reads[k] = to.zeros;
      for (int64_t k = left; k < right; ++k) reads[k] = line + (w + k * a.step_w) * a.in_stride;
      for (int64_t k = right; k < row; ++k) reads[k] = to.zeros;
    }
    const int64_t first = (p.n * a.out_h + a.out_origin_h + p.i * a.out_step_h) * a.out_w +
                          a.out_origin_w + p.j * a.out_step_w;
    for (int64_t k = 0; k < row; ++k)
      to.places[s + k] = {p.n, (first + k * a.out_step_w) * a.out_stride};
    s += row;
  }
}

// Neurons [first, first + used) of R pixels, whose u is given.
template <class T, int R, int V>
inline void write_tile(const Direct<T>& a, const Place* places, int64_t first, int64_t used,
                       Vec<T> (&u)[R][V]) {
  constexpr int L = VecOf<T>::lanes;
  const Epilogue<T>& e = *a.epilogue;
  if (used < V * L) {
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < R; ++i)
        OutputLane<T>(&e, places[i].sample, first + v * L, min(L, used - v * L))
            .write(a.output, places[i].element + first + v * L, u[i][v]);
    return;
  }
  // Loops over the tile are innermost and unrolled: it stays in registers.
  const auto each = [&](auto change) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        u[i][v] = change(u[i][v], places[i].element + first + v * L, i, first + v * L);
  };
  if (e.u) each([&](Vec<T> x, int64_t at, int, int64_t) { return store<T>(e.u + at, x), x; });
  if (e.mask)
    each([&](Vec<T> x, int64_t, int i, int64_t neuron) {
      const T* mask = e.mask + places[i].sample * e.mask_stride;
      const Vec<T> t = load<T>(e.scale + neuron) * x + load<T>(e.shift + neuron);
      return load<T>(mask + neuron) * t + load<T>(e.bias + neuron);
    });
  if (e.residual)
    each([&](Vec<T> x, int64_t at, int, int64_t) { return x + load<T>(e.residual + at); });
  if (e.active)
    each([&](Vec<T> x, int64_t at, int, int64_t) {
      return store_flags<T>(e.active + at, ~(x <= T(0)), L), x;
    });
  if (e.relu) each([](Vec<T> x, int64_t, int, int64_t) { return x < T(0) ? Vec<T>{} : x; });
  each([&](Vec<T> x, int64_t at, int, int64_t) { return store<T>(a.output + at, x), x; });
}
