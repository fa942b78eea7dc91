// Convolution where pixels of an output row read at equal distances, and few long runs each: images
// of few channels, padded, a row of the kernel at a time; and 1x1 kernels. Included once per
// instruction set; see isa.inl.
#pragma once

// Where pixels next to each other in a row are written.
struct RowPlaces {
  int64_t sample, first, next;
  Place operator[](int64_t i) const { return {sample, first + i * next}; }
};

// R pixels times a panel of V vectors, or two panels of two each; in parts where sums are longer
// than kLongestSum, which have smaller rounding errors than one long sum.
template <class T, int V, bool InParts, int R>
[[gnu::noinline]] void rows_tile(const Direct<T>& a, const T* from, const T* panel,
                                 const RowPlaces& places, int64_t first, int64_t used) {
  constexpr int L = VecOf<T>::lanes, kOne = V < 2 ? V : 2;  // vectors of one panel
  const int64_t second = a.taps * a.depth * kOne * L;
  // Unrolled before anything else, these loops over the tile leave it in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // What the next tile writes, or the one behind it, where these are low; with stride 1 below what
  // the next one reads.
  constexpr int kLater = V > 2 ? 2 * R : R;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) prefetch_outputs<V * L>(a, places[kLater + i].element + first);
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
#pragma GCC unroll 3
      for (int64_t d = begin; d < end; ++d) {
        Vec<T> b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load<T>(panel + (v < kOne ? 0 : second) + v % kOne * L);
        __builtin_prefetch(next + d * R);
        panel += kOne * L;
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

// Pixels next to each other, a panel or two, in tiles of nearly equal height: a short last one
// could not hide the latency.
template <class T, int V, bool InParts>
inline void rows_of_panels(int64_t pixels, const Direct<T>& a, const T* from, const T* panel,
                           const RowPlaces& places, int64_t first) {
  constexpr int kMost = V > 2 ? kRows / 2 : kRows;
  const int64_t used = min(V * VecOf<T>::lanes, a.width - first), step = a.step_w * a.in_stride;
  const int64_t tiles = (pixels + kMost - 1) / kMost;
  for (int64_t t = 0, s = 0; t < tiles; ++t) {
    const int64_t stop = (t + 1) * pixels / tiles;
    const RowPlaces own{places.sample, places.first + s * places.next, places.next};
    rows_of<T, V, InParts, kMost>(stop - s, a, from + s * step, panel, own, first, used);
    s = stop;
  }
}

// Grid pixels [begin, end) of one group. Every tap reads a run of `depth` elements inside the image
// from column step_w * j on; tap_w is not read.
template <class T, bool InParts>
inline void rows_between(const Direct<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t W = Panels<T>::kWide;
  // Fewer rows by two panels need fewer broadcasts, where registers suffice for their weights.
  constexpr bool kPairs = kRows > 6 && !InParts;
  const Panels<T> shape{a.width};
  const int64_t total = a.taps * a.depth, step = a.step_w * a.in_stride;
  const int64_t next = a.out_step_w * a.out_stride, size = sizeof(T);
  // Tiles that a panel passes over before the next one does: one, so that the output is written
  // front to back, a few where the first cache does not have all panels, or, where the second one
  // does not either, as many as have their inputs there.
  const int64_t bytes = shape.padded() * total * size;
  const int64_t many = max<int64_t>(1, a.l2 / 2 / (kRows * step * size));
  const int64_t together = kRows * (bytes <= a.l1 / 2 ? 1 : bytes <= a.l2 / 2 ? 4 : many);
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t left = min(a.cols - at.j, end - begin);
    const int64_t row = (at.n * a.in_h + at.i * a.step_h - a.first_row) * a.in_w;
    const T* from = a.input + row * a.in_stride + at.j * step;
    const int64_t out_row = (at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h) * a.out_w;
    const int64_t out = (out_row + a.out_origin_w + at.j * a.out_step_w) * a.out_stride;
    const int64_t blocks = (left + together - 1) / together;
    for (int64_t b = 0, s = 0; b < blocks; ++b) {
      const int64_t count = (b + 1) * left / blocks - s;
      const T* const x = from + s * step;
      const RowPlaces places{at.n, out + s * next, next};
      for (int64_t p = 0; p < shape.count(); ++p) {
        const T* panel = a.panels + p * W * total;
        if (kPairs && p + 1 < shape.count() && shape.lanes(p + 1) == W) {
          rows_of_panels<T, kPairs ? 4 : 2, InParts>(count, a, x, panel, places, p * W);
          ++p;
        } else if (shape.lanes(p) == W) {
          rows_of_panels<T, 2, InParts>(count, a, x, panel, places, p * W);
        } else {
          rows_of_panels<T, 1, InParts>(count, a, x, panel, places, p * W);
        }
      }
      s += count;
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
