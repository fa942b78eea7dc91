// Convolution where pixels of an output row read at equal distances, and few long runs each: images
// of few channels, padded, a row of the kernel at a time; and 1x1 kernels. Included once per
// instruction set; see isa.inl.
#pragma once

// Where pixels next to each other in a row are written.
struct RowPlaces {
  int64_t sample, first, next;
  Place operator[](int64_t i) const { return {sample, first + i * next}; }
};

// R pixels times a panel of V vectors; in parts where sums are longer than kLongestSum, which have
// smaller rounding errors than one long sum.
template <class T, int V, bool InParts, int R>
[[gnu::noinline]] void rows_tile(const Direct<T>& a, const T* from, const T* panel,
                                 const RowPlaces& places, int64_t first, int64_t used) {
  constexpr int L = VecOf<T>::lanes;
  // Unrolled before anything else, these loops over the tile leave it in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // What the next tile writes and, with stride 1, reads.
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) prefetch_outputs<V * L>(a, places[R + i].element + first);
  const int64_t row = a.in_w * a.in_stride, step = a.step_w * a.in_stride;
  const T* const next = from + R * step;
  constexpr int kParts = InParts ? R : 1;
  Vec<T> parts[kParts][V] = {};
  int64_t added = 0;
  for (int64_t q = 0; q < a.taps; ++q)
    for (int64_t begin = 0, end; begin < a.depth; begin = end) {
      end = InParts ? min(a.depth, begin + kLongestSum) : a.depth;
      if constexpr (InParts) {
        if (added + end - begin > kLongestSum) {
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) parts[i][v] += acc[i][v], acc[i][v] = Vec<T>{};
          added = 0;
        }
        added += end - begin;
      }
      // Three pixels a pointer: x86 addresses at base, base + step and base + 2 * step.
      const T* base[(R + 2) / 3];
#pragma GCC unroll 16
      for (int i = 0; i < R; i += 3) base[i / 3] = from + a.tap_h[q] * row + i * step + begin;
#pragma GCC unroll 4
      for (int64_t d = begin; d < end; ++d) {
        Vec<T> b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * L);
        __builtin_prefetch(next + d * R);
        panel += V * L;
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const T x = base[i / 3][i % 3 * step];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[i][v] += b[v] * x;
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i += 3) ++base[i / 3];
      }
    }
  if constexpr (InParts)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += parts[i][v];
  write_tile(a, places, first, used, acc);
}

template <class T, int V, bool InParts, int R = kRows>
inline void rows_of(int64_t count, const Direct<T>& a, const T* from, const T* panel,
                    const RowPlaces& places, int64_t first, int64_t used) {
  if constexpr (R > 0) {
    if (count == R)
      rows_tile<T, V, InParts, R>(a, from, panel, places, first, used);
    else
      rows_of<T, V, InParts, R - 1>(count, a, from, panel, places, first, used);
  }
}

// Grid pixels [begin, end) of one group. Every tap reads a run of `depth` elements inside the image
// from column step_w * j on; tap_w is not read.
template <class T, bool InParts>
inline void rows_between(const Direct<T>& a, int64_t begin, int64_t end) {
  const Panels<T> shape{a.width};
  const int64_t total = a.taps * a.depth, step = a.step_w * a.in_stride;
  const int64_t next = a.out_step_w * a.out_stride, size = sizeof(T);
  // Tiles that a panel passes over before the next one does: one, so that the output is written
  // front to back, unless all panels do not stay in the second cache.
  const bool stay = shape.padded() * total * size <= a.l2 / 2;
  const int64_t together = stay ? 1 : max<int64_t>(1, a.l2 / 2 / (kRows * step * size));
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t left = min(a.cols - at.j, end - begin), tiles = (left + kRows - 1) / kRows;
    const int64_t row = (at.n * a.in_h + at.i * a.step_h) * a.in_w;
    const T* from = a.input + row * a.in_stride + at.j * step;
    const int64_t out_row = (at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h) * a.out_w;
    const int64_t out = (out_row + a.out_origin_w + at.j * a.out_step_w) * a.out_stride;
    for (int64_t block = 0; block < tiles; block += together)
      for (int64_t p = 0; p < shape.count(); ++p) {
        const T* panel = a.panels + p * shape.kWide * total;
        const int64_t first = p * shape.kWide, used = shape.used(p);
        for (int64_t t = block; t < min(tiles, block + together); ++t) {
          // Of nearly equal height: a short last one could not hide the latency.
          const int64_t s = t * left / tiles, count = (t + 1) * left / tiles - s;
          const RowPlaces places{at.n, out + s * next, next};
          if (shape.lanes(p) == shape.kWide)
            rows_of<T, 2, InParts>(count, a, from + s * step, panel, places, first, used);
          else
            rows_of<T, 1, InParts>(count, a, from + s * step, panel, places, first, used);
        }
      }
    begin += left;
  }
}

template <class T>
void direct_rows(const Direct<T>& a, int64_t begin, int64_t end) {
  if (a.taps * a.depth <= kLongestSum)
    rows_between<T, false>(a, begin, end);
  else
    rows_between<T, true>(a, begin, end);
}
