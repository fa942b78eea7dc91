// Convolution as a matrix product over gathered rows. Included once per instruction set; see
// isa.inl.
#pragma once

template <class T>
int64_t panels_size(int64_t taps, int64_t depth, int64_t width) {
  return Panels<T>{width}.padded() * taps * depth;
}

template <class T>
int64_t panels_count(int64_t width) {
  return Panels<T>{width}.count();
}

template <class T>
void pack_panels(const PackPanels<T>& a, int64_t begin, int64_t end, T* panels) {
  constexpr int64_t L = VecOf<T>::lanes;
  const Panels<T> shape{a.width};
  for (int64_t p = begin; p < end; ++p) {
    const int64_t lanes = shape.lanes(p);
    for (int64_t v = 0; v < lanes; v += L) {
      T* panel = panels + p * shape.kWide * a.taps * a.depth + v;
      Weights<T> weights = a.weights;
      weights.data += (p * shape.kWide + v) * weights.stride_j;
      read_weights<T>(weights, min(L, shape.used(p) - v), a.depth,
                      [&](int64_t q, int64_t d, Vec<T> w) {
                        if (a.place[q] >= 0)
                          store<T>(panel + (a.place[q] * a.depth + d) * lanes, w);
                      });
    }
  }
}

// Where a grid pixel reads and writes.
struct GridPixel {
  int64_t n, i, j;
  GridPixel(int64_t p, int64_t rows, int64_t cols)
      : n(p / (rows * cols)), i(p / cols % rows), j(p % cols) {}
};

// The output pixel that a grid pixel becomes.
template <class T>
inline int64_t out_pixel(const GatherGemm<T>& a, const GridPixel& p) {
  return (p.n * a.out_h + a.out_origin_h + p.i * a.out_step_h) * a.out_w + a.out_origin_w +
         p.j * a.out_step_w;
}

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

// How a product over `total` elements is cut so that a panel's part stays in the first cache, and
// how many pixels' rows and products stay in the second.
template <class T>
struct GatherBlocks {
  int64_t parts, depth, pixels;
  explicit GatherBlocks(const GatherGemm<T>& a) {
    const int64_t total = a.taps * a.depth, size = sizeof(T);
    const int64_t most = max<int64_t>(64, a.l1 / (Panels<T>::kWide * size));
    parts = max<int64_t>(1, (total + most - 1) / most);
    depth = (total + parts - 1) / parts;
    const int64_t rows = a.l2 / 2 / ((skewed<T>(depth) + skewed<T>(a.width)) * size) / kRows;
    pixels = kRows * min(64, max<int64_t>(4, rows));
  }
};

template <class T>
int64_t gather_scratch(const GatherGemm<T>& a) {
  const GatherBlocks<T> blocks(a);
  return blocks.pixels * (skewed<T>(blocks.depth) + skewed<T>(Panels<T>{a.width}.padded()));
}

// Elements [begin, end) of a pixel's row, which has `depth` for each tap.
template <class T>
inline void gather_row(const GatherGemm<T>& a, const GridPixel& p, int64_t group, int64_t begin,
                       int64_t end, T* to) {
  const T* input = a.input + group * a.depth;
  const int64_t h = p.i * a.step_h, w = p.j * a.step_w;
  for (int64_t k = begin; k < end;) {
    const int64_t q = k / a.depth, d = k - q * a.depth;
    int64_t count = min(a.depth - d, end - k);
    const T* x = under_tap(input, a.in_h, a.in_w, a.in_stride, p.n, h + a.tap_h[q], w + a.tap_w[q]);
    // Taps side by side in memory are one run.
    if (x && a.in_stride == a.depth)
      for (int64_t next = q + 1;
           next < a.taps && k + count < end && d == 0 && a.tap_h[next] == a.tap_h[q] &&
           a.tap_w[next] == a.tap_w[next - 1] + 1 && w + a.tap_w[next] < a.in_w;
           ++next)
        count = min(count + a.depth, end - k);
    if (x)
      copy(x + d, count, to + k - begin);
    else
      clear(count, to + k - begin);
    k += count;
  }
}

template <class T>
void gather_gemm(const GatherGemm<T>& a, int64_t begin, int64_t end, T* scratch) {
  const Panels<T> shape{a.width};
  const GatherBlocks<T> cut(a);
  const int64_t total = a.taps * a.depth, group_panels = panels_size<T>(a.taps, a.depth, a.width);
  const int64_t row_stride = skewed<T>(cut.depth), out_stride = skewed<T>(shape.padded());
  T* products = scratch + cut.pixels * row_stride;
  for (int64_t chunk = begin; chunk < end; chunk += cut.pixels) {
    const int64_t pixels = min(cut.pixels, end - chunk);
    for (int64_t group = 0; group < a.groups; ++group) {
      const T* panels = a.panels + group * group_panels;
      for (int64_t part = 0; part < cut.parts; ++part) {
        const int64_t first = part * cut.depth, last = min(total, first + cut.depth);
        for (int64_t s = 0; s < pixels; ++s)
          gather_row(a, GridPixel(chunk + s, a.rows, a.cols), group, first, last,
                     scratch + s * row_stride);
        for (int64_t p = 0; p < shape.count(); ++p) {
          const int64_t lanes = shape.lanes(p);
          product<T>(pixels, {scratch, row_stride}, last - first,
                     panels + p * shape.kWide * total + first * lanes, lanes,
                     products + p * shape.kWide, out_stride, part > 0);
        }
      }
      for (int64_t s = 0; s < pixels; ++s) {
        const GridPixel p(chunk + s, a.rows, a.cols);
        const int64_t first = group * a.width;
        write_pixel(a.epilogue, products + s * out_stride, p.n, first, a.width, a.output,
                    out_pixel(a, p) * a.groups * a.width + first);
      }
    }
  }
}
