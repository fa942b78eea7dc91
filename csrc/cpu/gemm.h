// Matrix products over gathered rows. Included once per instruction set; see isa.inl.
#pragma once

// `rows` output rows by V vectors: acc[i][:] += row(i, tap)[d] * panel[tap][d][:].
// Row i of tap q starts at row[q * kRows + i]; element d of it is step elements further on.
template <class T, int R, int V>
inline void tile(const T* const* row, int64_t taps, int64_t depth, int64_t step, const T* panel,
                 T* out, int64_t out_stride, bool accumulate) {
  using Vec = typename VecOf<T>::type;
  constexpr int L = VecOf<T>::lanes;
  Vec acc[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v)
      acc[i][v] = accumulate ? load<T>(out + i * out_stride + v * L) : Vec{};
  for (int64_t q = 0; q < taps; ++q) {
    const T* r[R];
    for (int i = 0; i < R; ++i) r[i] = row[q * kRows + i];
    for (int64_t d = 0; d < depth; ++d) {
      Vec b[V];
      for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * L);
      panel += V * L;
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) acc[i][v] += b[v] * r[i][d * step];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store<T>(out + i * out_stride + v * L, acc[i][v]);
}

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

template <class T>
int64_t panels_size(int64_t taps, int64_t depth, int64_t width) {
  return Panels<T>{width}.padded() * taps * depth;
}

template <class T>
int64_t panels_count(int64_t width) {
  return Panels<T>{width}.count();
}

template <class T>
void pack_panels(const T* source, int64_t stride_j, int64_t stride_q, int64_t stride_d,
                 const int64_t* tap_index, int64_t taps, int64_t depth, int64_t width,
                 int64_t begin, int64_t end, T* panels) {
  const Panels<T> shape{width};
  for (int64_t p = begin; p < end; ++p) {
    const T* first = source + p * shape.kWide * stride_j;
    const int64_t lanes = shape.lanes(p), used = shape.used(p);
    T* panel = panels + p * shape.kWide * taps * depth;
    // Taps innermost: they lie side by side in contiguous weights.
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t q = 0; q < taps; ++q) {
        const T* from = first + tap_index[q] * stride_q + d * stride_d;
        T* to = panel + (q * depth + d) * lanes;
        for (int64_t j = 0; j < used; ++j) to[j] = from[j * stride_j];
        for (int64_t j = used; j < lanes; ++j) to[j] = 0;
      }
  }
}

// One chunk's panels stay in cache while all of the weights pass over it.
constexpr int64_t kChunk = 16 * kRows;

inline int64_t gather_scratch(int64_t taps) { return kChunk * taps; }

// Where a grid pixel reads and writes.
struct GridPixel {
  int64_t n, i, j;
  GridPixel(int64_t p, int64_t rows, int64_t cols)
      : n(p / (rows * cols)), i(p / cols % rows), j(p % cols) {}
};

// The input pixel under one tap of a grid pixel, or null outside the image.
template <class T>
inline const T* under_tap(const T* input, int64_t in_h, int64_t in_w, int64_t channels, int64_t n,
                          int64_t h, int64_t w) {
  if (h < 0 || h >= in_h || w < 0 || w >= in_w) return nullptr;
  return input + ((n * in_h + h) * in_w + w) * channels;
}

template <class T>
inline void apply_epilogue(const Epilogue<T>& e, const T* u, int64_t sample, int64_t element,
                           int64_t first, int64_t count, T* y) {
  const T* mask = e.mask + sample * e.mask_stride + first;
  const T* scale = e.scale + first;
  const T* shift = e.shift + first;
  const T* bias = e.bias + first;
  if (e.u)
    for (int64_t j = 0; j < count; ++j) e.u[element + j] = u[j];
  for (int64_t j = 0; j < count; ++j) y[j] = mask[j] * (scale[j] * u[j] + shift[j]) + bias[j];
  if (e.residual)
    for (int64_t j = 0; j < count; ++j) y[j] += e.residual[element + j];
  if (e.relu)
    for (int64_t j = 0; j < count; ++j) y[j] = relu(y[j]);
}

template <class T>
void gather_gemm(const GatherGemm<T>& a, int64_t begin, int64_t end, const T** scratch) {
  const Panels<T> shape{a.width};
  const int64_t group_panels = panels_size<T>(a.taps, a.depth, a.width);
  const int64_t channels = a.groups * a.width;
  alignas(64) T out[kRows * Panels<T>::kWide];
  int64_t sample[kChunk], element[kChunk];
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t pixels = min(kChunk, end - chunk);
    const int64_t blocks = (pixels + kRows - 1) / kRows;
    for (int64_t group = 0; group < a.groups; ++group) {
      for (int64_t s = 0; s < blocks * kRows; ++s) {
        const T** row = scratch + (s / kRows) * a.taps * kRows + s % kRows;
        if (s >= pixels) {
          for (int64_t q = 0; q < a.taps; ++q) row[q * kRows] = a.zeros;
          continue;
        }
        const GridPixel p(chunk + s, a.rows, a.cols);
        sample[s] = p.n;
        element[s] = ((p.n * a.out_h + a.out_origin_h + p.i * a.out_step_h) * a.out_w +
                      a.out_origin_w + p.j * a.out_step_w) *
                     channels;
        for (int64_t q = 0; q < a.taps; ++q) {
          const T* x = under_tap(a.input, a.in_h, a.in_w, a.in_channels, p.n,
                                 p.i * a.step_h + a.tap_h[q], p.j * a.step_w + a.tap_w[q]);
          row[q * kRows] = x ? x + group * a.depth : a.zeros;
        }
      }
      const T* panel = a.panels + group * group_panels;
      for (int64_t p = 0; p < shape.count(); ++p) {
        const int64_t lanes = shape.lanes(p), used = shape.used(p);
        const int64_t first = group * a.width + p * shape.kWide;
        for (int64_t b = 0; b < blocks; ++b) {
          const T* const* row = scratch + b * a.taps * kRows;
          if (lanes == shape.kWide)
            tile<T, kRows, 2>(row, a.taps, a.depth, 1, panel, out, lanes, false);
          else
            tile<T, kRows, 1>(row, a.taps, a.depth, 1, panel, out, lanes, false);
          for (int64_t s = b * kRows; s < min(pixels, (b + 1) * kRows); ++s) {
            const T* u = out + (s - b * kRows) * lanes;
            T* y = a.output + element[s] + first;
            if (a.epilogue)
              apply_epilogue(*a.epilogue, u, sample[s], element[s] + first, first, used, y);
            else
              for (int64_t j = 0; j < used; ++j) y[j] = u[j];
          }
        }
        panel += lanes * a.taps * a.depth;
      }
    }
  }
}

// A unit of a weight gradient is one tap, one group and up to this many output channels.
constexpr int64_t kUnitRows = 8 * kRows;
constexpr int64_t kGradChunk = 256;

template <class T>
int64_t weight_grad_units(const WeightGrad<T>& a) {
  return a.groups * a.taps * ((a.width + kUnitRows - 1) / kUnitRows);
}

template <class T>
int64_t weight_grad_scratch(const WeightGrad<T>& a) {
  return (kGradChunk + kUnitRows) * Panels<T>{a.depth}.padded();
}

// Copies the input pixels under one tap into panels [panel][pixel][lanes], zero where there are
// none.
template <class T>
void gather_panels(const WeightGrad<T>& a, int64_t group, int64_t tap, int64_t chunk,
                   int64_t pixels, T* out) {
  const Panels<T> shape{a.depth};
  for (int64_t s = 0; s < pixels; ++s) {
    const GridPixel p(chunk + s, a.rows, a.cols);
    const T* x = under_tap(a.input, a.in_h, a.in_w, a.in_channels, p.n,
                           p.i * a.step_h + a.tap_h[tap], p.j * a.step_w + a.tap_w[tap]);
    if (x) x += group * a.depth;
    T* panel = out;
    for (int64_t b = 0; b < shape.count(); ++b) {
      const int64_t lanes = shape.lanes(b), used = x ? shape.used(b) : 0;
      T* to = panel + s * lanes;
      for (int64_t j = 0; j < used; ++j) to[j] = x[b * shape.kWide + j];
      for (int64_t j = used; j < lanes; ++j) to[j] = 0;
      panel += pixels * lanes;
    }
  }
}

template <class T>
void weight_grad(const WeightGrad<T>& a, int64_t begin, int64_t end, T* scratch) {
  const Panels<T> shape{a.depth};
  const int64_t padded = shape.padded(), channels = a.groups * a.width;
  const int64_t blocks = (a.width + kUnitRows - 1) / kUnitRows;
  const int64_t all_pixels = a.batch * a.rows * a.cols;
  T* sum = scratch;
  T* panels = scratch + kUnitRows * padded;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * kUnitRows;
    const int64_t tap = unit / blocks % a.taps, group = unit / blocks / a.taps;
    const int64_t count = min(kUnitRows, a.width - first);
    for (int64_t i = 0; i < kUnitRows * padded; ++i) sum[i] = 0;
    for (int64_t chunk = 0; chunk < all_pixels; chunk += kGradChunk) {
      const int64_t pixels = min(kGradChunk, all_pixels - chunk);
      gather_panels(a, group, tap, chunk, pixels, panels);
      const T* panel = panels;
      for (int64_t b = 0; b < shape.count(); ++b) {
        const int64_t lanes = shape.lanes(b);
        for (int64_t r = 0; r < count; r += kRows) {
          // Rows past `count` read a neighbour's gradient and are dropped below.
          const T* row[kRows];
          for (int i = 0; i < kRows; ++i)
            row[i] = a.grad + chunk * channels + group * a.width + first + r + i;
          T* out = sum + r * padded + b * shape.kWide;
          if (lanes == shape.kWide)
            tile<T, kRows, 2>(row, 1, pixels, channels, panel, out, padded, true);
          else
            tile<T, kRows, 1>(row, 1, pixels, channels, panel, out, padded, true);
        }
        panel += pixels * lanes;
      }
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < a.depth; ++d)
        a.weight_grad[((group * a.width + first + r) * a.depth + d) * a.taps + tap] =
            sum[r * padded + d];
  }
}
