// Winograd's F(4x4, 3x3) and F(2x2, 3x3): a tile of 6x6 inputs gives 4x4 outputs with 36 products
// instead of 144, one of 4x4 gives 2x2 with 16 instead of 36.
// Included once per instruction set; see isa.inl and docs/kernels.md.
//
// In one dimension y = At((G w) * (Bt d)). Per position of a tile, the products of all tiles and
// channels are a matrix product:
// inputs [position][tile][depth] times weights [group][position][panel][depth][lanes].
#pragma once

// The points 0, 1, -1, 1/2, -2 and infinity.
template <class Type>
struct F4 {
  using T = Type;
  static constexpr int64_t kIn = 6, kOut = 4;

  // G, whose rows carry the divisors that Bt is then free of.
  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> a = w[0], b = w[step], c = w[2 * step];
    const Vec<T> ends = a + c, wide = a + T(4) * c;
    out[0] = a;
    out[out_step] = (ends + b) * T(1. / 3);
    out[2 * out_step] = (b - ends) * T(1. / 3);
    out[3 * out_step] = (a + T(0.5) * b + T(0.25) * c) * T(-16. / 15);
    out[4 * out_step] = (wide - T(2) * b) * T(1. / 15);
    out[5 * out_step] = c;
  }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    const Vec<T> odd = d[3] - d[1], even = d[4] - d[2];
    out[0] = (d[0] + d[4]) - T(2) * d[2] + T(1.5) * odd;
    out[out_step] = (d[4] - d[1]) + T(0.5) * d[2] + T(2.5) * d[3];
    out[2 * out_step] = (d[4] + d[1]) - T(2.5) * d[2] + T(0.5) * d[3];
    out[3 * out_step] = even + T(2) * odd;
    out[4 * out_step] = even - T(0.5) * odd;
    out[5 * out_step] = (d[1] + d[5]) - T(2) * d[3] + T(1.5) * even;
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2];
    out[0] = (m[0] + sum) + (m[3] + m[4]);
    out[out_step] = difference + T(0.5) * m[3] - T(2) * m[4];
    out[2 * out_step] = sum + T(0.25) * m[3] + T(4) * m[4];
    out[3 * out_step] = difference + T(0.125) * m[3] - T(8) * m[4] + m[5];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out, int64_t out_step) {
    const Vec<T> even = y[0] + y[2], odd = y[1] + y[3];
    out[0] = y[0];
    out[out_step] = even + odd;
    out[2 * out_step] = even - odd;
    out[3 * out_step] = (y[0] + T(0.25) * y[2]) + (T(0.5) * y[1] + T(0.125) * y[3]);
    out[4 * out_step] = (y[0] + T(4) * y[2]) - (T(2) * y[1] + T(8) * y[3]);
    out[5 * out_step] = y[3];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    const Vec<T> sum = (m[1] + m[2]) * T(1. / 3), difference = (m[1] - m[2]) * T(1. / 3);
    const Vec<T> half = m[3] * T(-4. / 15), two = m[4] * T(1. / 15);
    out[0] = m[0] + difference + (T(4) * half + two);
    out[out_step] = sum + T(2) * (half - two);
    out[2 * out_step] = difference + (half + T(4) * two) + m[5];
  }
};

// The points 0, 1, -1 and infinity.
template <class Type>
struct F2 {
  using T = Type;
  static constexpr int64_t kIn = 4, kOut = 2;

  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> ends = w[0] + w[2 * step];
    out[0] = w[0];
    out[out_step] = (ends + w[step]) * T(0.5);
    out[2 * out_step] = (ends - w[step]) * T(0.5);
    out[3 * out_step] = w[2 * step];
  }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    out[0] = d[0] - d[2];
    out[out_step] = d[1] + d[2];
    out[2 * out_step] = d[2] - d[1];
    out[3 * out_step] = d[1] - d[3];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    out[0] = m[0] + m[1] + m[2];
    out[out_step] = m[1] - m[2] - m[3];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out, int64_t out_step) {
    out[0] = y[0];
    out[out_step] = y[0] + y[1];
    out[2 * out_step] = y[0] - y[1];
    out[3 * out_step] = -y[1];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    const Vec<T> sum = (m[1] + m[2]) * T(0.5);
    out[0] = m[0] + sum;
    out[out_step] = (m[1] - m[2]) * T(0.5);
    out[2 * out_step] = sum + m[3];
  }
};

template <class F>
constexpr int64_t kPositions = F::kIn * F::kIn;

// Panels whose products are kept until they become outputs: 32 channels.
template <class T>
constexpr int64_t kGroupPanels = (32 + Panels<T>::kWide - 1) / Panels<T>::kWide;

template <class T>
int64_t winograd_groups(int64_t width) {
  return (Panels<T>{width}.count() + kGroupPanels<T> - 1) / kGroupPanels<T>;
}

// Elements from one position's weights of a whole group to the next.
template <class T>
inline int64_t group_position(int64_t depth) {
  return kGroupPanels<T> * Panels<T>::kWide * depth + kSkew;
}

template <class F>
int64_t winograd_group_size(int64_t depth) {
  return kPositions<F> * group_position<typename F::T>(depth);
}

// Elements from one position's inputs of so many tiles to the next.
template <class T>
inline int64_t input_position(int64_t depth, int64_t tiles) {
  return tiles * skewed<T>(depth) + kSkew;
}

template <class F>
int64_t winograd_input_size(int64_t depth, int64_t tiles) {
  return kPositions<F> * input_position<typename F::T>(depth, tiles);
}

template <class T>
inline int64_t product_position(int64_t tiles) {
  return tiles * kGroupPanels<T> * Panels<T>::kWide + kSkew;
}

template <class F>
int64_t winograd_product_size(int64_t tiles) {
  return kPositions<F> * product_position<typename F::T>(tiles);
}

// Inputs of a block of tiles take about half of the second cache; with fewer tiles than these the
// weights would be read too often.
template <class F>
int64_t winograd_block(int64_t depth, int64_t l2) {
  using T = typename F::T;
  const int64_t budget = l2 / 2 / (kPositions<F> * depth * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = kRows * ((24 + kRows - 1) / kRows);
  return max(rows, min(4 * rows, budget / rows * rows));
}

// One panel of V vectors, whose weights are taps[d][q][V vectors].
template <class F, int V, class T = typename F::T>
inline void pack_winograd_panel(const T* taps, int64_t depth, int64_t position, T* panel) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t d = 0; d < depth; ++d, taps += 9 * V * L, panel += V * L)
    for (int v = 0; v < V; ++v) {
      Vec<T> w[9], half[3 * F::kIn], whole[F::kIn];
      for (int64_t q = 0; q < 9; ++q) w[q] = load<T>(taps + (q * V + v) * L);
      for (int64_t j = 0; j < 3; ++j) F::weight(w + j, 3, half + j, 3);
      for (int64_t i = 0; i < F::kIn; ++i) {
        F::weight(half + 3 * i, 1, whole, 1);
        for (int64_t j = 0; j < F::kIn; ++j)
          store<T>(panel + (i * F::kIn + j) * position + v * L, whole[j]);
      }
    }
}

// Weight j, tap q, channel d is source[j * stride_j + q * stride_q + d * stride_d].
template <class F, class T = typename F::T>
void winograd_pack(const T* source, int64_t stride_j, int64_t stride_q, int64_t stride_d,
                   bool rotated, int64_t depth, int64_t width, int64_t group, T* packed) {
  // Gathered some way ahead: a vector load right behind the scalar stores would wait for them.
  constexpr int64_t kAhead = 16;
  const Panels<T> shape{width};
  const int64_t first = group * kGroupPanels<T>, position = group_position<T>(depth);
  const int64_t last = min(shape.count(), first + kGroupPanels<T>);
  alignas(64) T taps[kAhead * 9 * Panels<T>::kWide];
  for (int64_t p = first; p < last; ++p) {
    const int64_t lanes = shape.lanes(p), used = shape.used(p);
    const T* from = source + p * Panels<T>::kWide * stride_j;
    T* panel = packed + (p - first) * depth * Panels<T>::kWide;
    for (int64_t d = 0; d < depth; d += kAhead) {
      const int64_t count = min(kAhead, depth - d);
      for (int64_t j = 0; j < lanes; ++j)
        for (int64_t i = 0; i < count; ++i) {
          const T* w = from + j * stride_j + (d + i) * stride_d;
          __builtin_prefetch(w + kAhead * stride_d);
          for (int64_t q = 0; q < 9; ++q)
            taps[(i * 9 + (rotated ? 8 - q : q)) * lanes + j] = j < used ? w[q * stride_q] : T(0);
        }
      if (lanes == Panels<T>::kWide)
        pack_winograd_panel<F, 2>(taps, count, position, panel + d * lanes);
      else
        pack_winograd_panel<F, 1>(taps, count, position, panel + d * lanes);
    }
  }
}

// Where a tile reads and writes: the sample, and the first row and column of its outputs.
template <class F, class T = typename F::T>
struct TileAt {
  int64_t n, h, w;
  TileAt(const Winograd<T>& a, int64_t tile) {
    const int64_t rows = (a.out_h + F::kOut - 1) / F::kOut;
    const int64_t cols = (a.out_w + F::kOut - 1) / F::kOut;
    n = tile / (rows * cols);
    h = tile / cols % rows * F::kOut;
    w = tile % cols * F::kOut;
  }
};

template <class F, class T = typename F::T>
int64_t winograd_tiles(const Winograd<T>& a) {
  return a.batch * ((a.out_h + F::kOut - 1) / F::kOut) * ((a.out_w + F::kOut - 1) / F::kOut);
}

// One vector of channels, or the last `count` of them, of a tile whose pixels are given.
template <class F, bool Whole, class T = typename F::T>
inline void input_lane(const T* const* pixel, int64_t c, int64_t count, T* out, int64_t position) {
  Vec<T> d[F::kIn], half[kPositions<F>], whole[F::kIn];
  for (int64_t j = 0; j < F::kIn; ++j) {
    for (int64_t i = 0; i < F::kIn; ++i) {
      const T* x = pixel[i * F::kIn + j] + c;
      d[i] = Whole ? load<T>(x) : load_some<T>(x, count);
    }
    F::input(d, half + j, F::kIn);
  }
  for (int64_t i = 0; i < F::kIn; ++i) {
    F::input(half + i * F::kIn, whole, 1);
    for (int64_t j = 0; j < F::kIn; ++j) store<T>(out + (i * F::kIn + j) * position, whole[j]);
  }
}

// The pixels under a tile.
template <class F, class T = typename F::T>
inline void tile_pixels(const Winograd<T>& a, int64_t tile, const T** pixel) {
  const TileAt<F> at(a, tile);
  for (int64_t i = 0; i < F::kIn; ++i)
    for (int64_t j = 0; j < F::kIn; ++j) {
      const T* x = under_tap(a.input, a.in_h, a.in_w, a.in_stride, at.n, at.h + i - a.padding_h,
                             at.w + j - a.padding_w);
      pixel[i * F::kIn + j] = x ? x : a.zeros;
    }
}

// Inputs of tiles [begin, end), written from row `row` on of a buffer of `tiles` rows a position.
template <class F, class T = typename F::T>
void winograd_input(const Winograd<T>& a, int64_t begin, int64_t end, T* inputs, int64_t row,
                    int64_t tiles) {
  constexpr int64_t L = VecOf<T>::lanes, kLine = 64 / sizeof(T);
  const int64_t stride = skewed<T>(a.depth), position = input_position<T>(a.depth, tiles);
  const T* pixels[2][kPositions<F>];
  tile_pixels<F>(a, begin, pixels[0]);
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* const* pixel = pixels[(tile - begin) % 2];
    const T** next = pixels[(tile - begin + 1) % 2];
    tile_pixels<F>(a, min(tile + 1, end - 1), next);
    T* out = inputs + (row + tile - begin) * stride;
    int64_t c = 0;
    for (; c + L <= a.depth; c += L) {
      if (c % kLine == 0)
        for (int64_t q = 0; q < kPositions<F>; ++q)
          if (q % F::kIn >= F::kIn - F::kOut) __builtin_prefetch(next[q] + c);
      input_lane<F, true>(pixel, c, L, out + c, position);
    }
    if (c < a.depth) input_lane<F, false>(pixel, c, a.depth - c, out + c, position);
  }
}

// Outputs of tiles [begin, end) for one group of channels, from row `row` on of the inputs.
template <class F, class T = typename F::T>
void winograd_output(const Winograd<T>& a, int64_t begin, int64_t end, const T* inputs, int64_t row,
                     int64_t tiles, int64_t group, const T* packed, T* products) {
  constexpr int64_t L = VecOf<T>::lanes, kWide = Panels<T>::kWide;
  const Panels<T> shape{a.width};
  const int64_t first = group * kGroupPanels<T>;
  const int64_t last = min(shape.count(), first + kGroupPanels<T>);
  const int64_t stride = skewed<T>(a.depth), position = input_position<T>(a.depth, tiles);
  const int64_t count = end - begin;
  const int64_t width = (last - first) * kWide;
  const int64_t out_position = product_position<T>(count);
  for (int64_t q = 0; q < kPositions<F>; ++q)
    for (int64_t p = first; p < last; ++p) {
      const T* panel = packed + q * group_position<T>(a.depth) + (p - first) * a.depth * kWide;
      T* to = products + q * out_position + (p - first) * kWide;
      product<T>(count, {inputs + q * position + row * stride, stride}, a.depth, panel,
                 shape.lanes(p), to, width);
    }
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileAt<F> at(a, tile);
    const int64_t rows = min(F::kOut, a.out_h - at.h), cols = min(F::kOut, a.out_w - at.w);
    for (int64_t k = first * kWide; k < min(a.width, last * kWide); k += L) {
      const T* from = products + (tile - begin) * width + k - first * kWide;
      Vec<T> m[F::kIn], half[F::kOut * F::kIn], whole[F::kOut];
      for (int64_t j = 0; j < F::kIn; ++j) {
        for (int64_t i = 0; i < F::kIn; ++i) m[i] = load<T>(from + (i * F::kIn + j) * out_position);
        F::output(m, half + j, F::kIn);
      }
      const OutputLane<T> lane(a.epilogue, at.n, k, min(L, a.width - k));
      for (int64_t i = 0; i < rows; ++i) {
        F::output(half + i * F::kIn, whole, 1);
        const int64_t element = ((at.n * a.out_h + at.h + i) * a.out_w + at.w) * a.width + k;
        for (int64_t j = 0; j < cols; ++j) lane.write(a.output, element + j * a.width, whole[j]);
      }
    }
  }
}
