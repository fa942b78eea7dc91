// The micro-kernel: a few rows times a panel of weights. Included once per instruction set; see
// isa.inl.
#pragma once

// Panels are two vectors wide; the last of a group is one where that is enough.
template <class T>
struct Panels {
  static constexpr int64_t kWide = 2 * VecOf<T>::lanes;
  int64_t width;
  int64_t count() const { return (width + kWide - 1) / kWide; }
  int64_t lanes(int64_t panel) const {
    return width - panel * kWide <= VecOf<T>::lanes ? VecOf<T>::lanes : kWide;
  }
  int64_t used(int64_t panel) const { return min(kWide, width - panel * kWide); }
  int64_t padded() const { return width == 0 ? 0 : (count() - 1) * kWide + lanes(count() - 1); }
};

// Rows that lie a multiple of 4 KiB apart would share cache sets.
constexpr int64_t kSkew = 16;

// Elements from one row of `size` to the next, each of which starts at a vector.
template <class T>
inline int64_t skewed(int64_t size) {
  return (size + VecOf<T>::lanes - 1) / VecOf<T>::lanes * VecOf<T>::lanes + kSkew;
}

// A product's left side: rows of `depth` elements, or its transpose.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;  // from one row to the next, or from one element of the depth to the next
};

// out[i][:] = sum over d of rows[i][d] * panel[d][:], for R rows and V vectors; added to `out`
// where `accumulate`. Transposed: element (i, d) lies at rows[d][i]. Not inlined: its pointers are
// to stay in registers.
template <class T, bool Transposed, int R, int V>
[[gnu::noinline]] void product_tile(Rows<T> rows, int64_t depth, const T* panel, T* out,
                                    int64_t out_stride, bool accumulate) {
  constexpr int L = VecOf<T>::lanes;
  // Unrolled before anything else, these loops over the tile leave it in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // Three rows a pointer: x86 addresses at base, base + stride and base + 2 * stride.
  const T* base[(R + 2) / 3];
#pragma GCC unroll 16
  for (int i = 0; i < R; i += 3) base[i / 3] = rows.data + (Transposed ? i : i * rows.stride);
  // What the product reads some elements later, of the panel and of the next one, which lies behind
  // it: the processor does not see beyond its page.
  constexpr int kAhead = 16;
  const auto step = [&] {
    Vec<T> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * L);
    prefetch<V * L>(panel + kAhead * V * L, false);
    panel += V * L;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T x = base[i / 3][Transposed ? i % 3 : i % 3 * rows.stride];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += b[v] * x;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i += 3) base[i / 3] += Transposed ? rows.stride : 1;
  };
  constexpr int64_t kLine = 64 / sizeof(T), kSteps = 4, kEach = (R * kSteps + kLine - 1) / kLine;
  const T* ahead = rows.data + 2 * kLine;
  int64_t d = 0;
  for (; d + kSteps <= depth; d += kSteps) {
    if constexpr (!Transposed) {
      // A line of some of the rows in turn, two lines ahead.
#pragma GCC unroll 4
      for (int64_t i = 0; i < kEach; ++i) __builtin_prefetch(ahead + i * rows.stride);
      ahead += kEach * rows.stride;
      if (d % kLine == kLine - kSteps) ahead += kLine - kLine / kSteps * kEach * rows.stride;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSteps; ++i) step();
  }
  for (; d < depth; ++d) step();
  // Sums of parts have smaller rounding errors than one long sum.
  if (accumulate)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += load<T>(out + i * out_stride + v * L);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<T>(out + i * out_stride + v * L, acc[i][v]);
}

template <class T, bool Transposed, int V, int R = kRows>
inline void product_rows(int64_t count, Rows<T> rows, int64_t depth, const T* panel, T* out,
                         int64_t out_stride, bool accumulate) {
  if constexpr (R > 0) {
    if (count == R)
      product_tile<T, Transposed, R, V>(rows, depth, panel, out, out_stride, accumulate);
    else
      product_rows<T, Transposed, V, R - 1>(count, rows, depth, panel, out, out_stride, accumulate);
  }
}

// All of `count` rows times a panel of one or two vectors.
template <class T, bool Transposed = false>
inline void product(int64_t count, Rows<T> rows, int64_t depth, const T* panel, int64_t lanes,
                    T* out, int64_t out_stride, bool accumulate = false) {
  // Blocks of nearly equal height: a short last one could not hide the latency.
  const int64_t blocks = (count + kRows - 1) / kRows;
  for (int64_t b = 0, i = 0; b < blocks; ++b) {
    const int64_t next = (b + 1) * count / blocks;
    const Rows<T> block{rows.data + (Transposed ? i : i * rows.stride), rows.stride};
    if (lanes == Panels<T>::kWide)
      product_rows<T, Transposed, 2>(next - i, block, depth, panel, out + i * out_stride,
                                     out_stride, accumulate);
    else
      product_rows<T, Transposed, 1>(next - i, block, depth, panel, out + i * out_stride,
                                     out_stride, accumulate);
    i = next;
  }
}
