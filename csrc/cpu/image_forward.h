// Convolution of padded images of few channels: pixels of a row at equal distances, and a run of
// inputs for each row of the kernel. Included once per instruction set; see isa.inl.
#pragma once

// R pixels of a row times a panel of V vectors.
template <class T, int V, int R>
[[gnu::noinline]] void image_tile(const Direct<T>& a, const T* from, const T* panel,
                                  const Place* places, int64_t first, int64_t used) {
  constexpr int L = VecOf<T>::lanes;
  // Unrolled before anything else, these loops over the tile leave it in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  for (int i = 0; i < R; ++i) prefetch_outputs<V * L>(a, places[i].element + R * a.width + first);
  const int64_t row = a.in_w * a.in_stride, step = a.step_w * a.in_stride, depth = a.depth;
  for (int64_t q = 0; q < a.taps; ++q) {
    // Three pixels a pointer: x86 addresses at base, base + step and base + 2 * step.
    const T* base[(R + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < R; i += 3) base[i / 3] = from + a.tap_h[q] * row + i * step;
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; ++d) {
      Vec<T> b[V];
      for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * L);
      panel += V * L;
      for (int i = 0; i < R; ++i) {
        const T x = base[i / 3][i % 3 * step];
        for (int v = 0; v < V; ++v) acc[i][v] += b[v] * x;
      }
      for (int i = 0; i < R; i += 3) ++base[i / 3];
    }
  }
  write_tile(a, places, first, used, acc);
}

template <class T, int V, int R = kRows>
inline void image_rows(int64_t count, const Direct<T>& a, const T* from, const T* panel,
                       const Place* places, int64_t first, int64_t used) {
  if constexpr (R > 0) {
    if (count == R)
      image_tile<T, V, R>(a, from, panel, places, first, used);
    else
      image_rows<T, V, R - 1>(count, a, from, panel, places, first, used);
  }
}

// Grid pixels [begin, end). Every tap is a row of `depth` elements inside the image.
template <class T>
void image_forward(const Direct<T>& a, int64_t begin, int64_t end) {
  const Panels<T> shape{a.width};
  const int64_t total = a.taps * a.depth, step = a.step_w * a.in_stride;
  Place places[kRows];
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t left = min(a.cols - at.j, end - begin), tiles = (left + kRows - 1) / kRows;
    const T* from =
        a.input + ((at.n * a.in_h + at.i * a.step_h) * a.in_w) * a.in_stride + at.j * step;
    // Tiles of nearly equal height: a short last one could not hide the latency.
    for (int64_t t = 0, s = 0, stop; t < tiles; ++t, s = stop) {
      stop = (t + 1) * left / tiles;
      for (int64_t i = 0; i < stop - s; ++i) places[i] = {at.n, (begin + s + i) * a.width};
      for (int64_t p = 0; p < shape.count(); ++p) {
        const T* panel = a.panels + p * shape.kWide * total;
        const int64_t first = p * shape.kWide, used = shape.used(p);
        if (shape.lanes(p) == shape.kWide)
          image_rows<T, 2>(stop - s, a, from + s * step, panel, places, first, used);
        else
          image_rows<T, 1>(stop - s, a, from + s * step, panel, places, first, used);
      }
    }
    begin += left;
  }
}
