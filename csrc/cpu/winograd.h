// Winograd's F(4x4, 3x3): a tile of 6x6 inputs gives 4x4 outputs with 36 products, not 144.
// Included once per instruction set; see isa.inl.
//
// In one dimension y = At((G w) * (Bt d)), with the points 0, 1, -1, 1/2, -2 and infinity.
// Per position of the 36, the products of all tiles and channels are a matrix product:
// inputs [36][tile][depth] times weights [group][36][panel][depth][lanes].
#pragma once

constexpr int64_t kTileIn = 6, kTileOut = 4, kPositions = 36;
// Rows that lie a multiple of 4 KiB apart would share cache sets.
constexpr int64_t kSkew = 16;

// Panels whose products are kept until they become outputs: 32 channels.
template <class T>
constexpr int64_t kGroupPanels = (32 + Panels<T>::kWide - 1) / Panels<T>::kWide;

template <class T>
inline int64_t lanes_up(int64_t size) {
  return (size + VecOf<T>::lanes - 1) / VecOf<T>::lanes * VecOf<T>::lanes;
}

// Elements of one tile's input at one position, and from one position to the next.
template <class T>
inline int64_t tile_stride(int64_t depth) {
  return lanes_up<T>(depth) + kSkew;
}

// G, whose rows carry the divisors that Bt is then free of.
template <class T>
inline void transform_weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
  const Vec<T> a = w[0], b = w[step], c = w[2 * step];
  const Vec<T> ends = a + c, wide = a + T(4) * c;
  out[0] = a;
  out[out_step] = (ends + b) * T(1. / 3);
  out[2 * out_step] = (b - ends) * T(1. / 3);
  out[3 * out_step] = (a + T(0.5) * b + T(0.25) * c) * T(-16. / 15);
  out[4 * out_step] = (wide - T(2) * b) * T(1. / 15);
  out[5 * out_step] = c;
}

template <class T>
inline void transform_input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
  const Vec<T> odd = d[3] - d[1], even = d[4] - d[2];
  out[0] = (d[0] + d[4]) - T(2) * d[2] + T(1.5) * odd;
  out[out_step] = (d[4] - d[1]) + T(0.5) * d[2] + T(2.5) * d[3];
  out[2 * out_step] = (d[4] + d[1]) - T(2.5) * d[2] + T(0.5) * d[3];
  out[3 * out_step] = even + T(2) * odd;
  out[4 * out_step] = even - T(0.5) * odd;
  out[5 * out_step] = (d[1] + d[5]) - T(2) * d[3] + T(1.5) * even;
}

template <class T>
inline void transform_output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
  const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2];
  out[0] = (m[0] + sum) + (m[3] + m[4]);
  out[out_step] = difference + T(0.5) * m[3] - T(2) * m[4];
  out[2 * out_step] = sum + T(0.25) * m[3] + T(4) * m[4];
  out[3 * out_step] = difference + T(0.125) * m[3] - T(8) * m[4] + m[5];
}

template <class T>
int64_t winograd_groups(int64_t width) {
  return (Panels<T>{width}.count() + kGroupPanels<T> - 1) / kGroupPanels<T>;
}

// Elements from one position's weights of a whole group to the next.
template <class T>
inline int64_t group_position(int64_t depth) {
  return kGroupPanels<T> * Panels<T>::kWide * depth + kSkew;
}

template <class T>
int64_t winograd_group_size(int64_t depth) {
  return kPositions * group_position<T>(depth);
}

template <class T>
int64_t winograd_input_size(int64_t depth, int64_t tiles) {
  return kPositions * (tiles * tile_stride<T>(depth) + kSkew);
}

template <class T>
inline int64_t product_position(int64_t tiles) {
  return tiles * kGroupPanels<T> * Panels<T>::kWide + kSkew;
}

template <class T>
int64_t winograd_product_size(int64_t tiles) {
  return kPositions * product_position<T>(tiles);
}

// Inputs of a block of tiles take about half of a 512 KiB cache of the second level; with fewer
// tiles than these the weights would be read too often.
template <class T>
int64_t winograd_block(int64_t depth) {
  const int64_t budget = 256 * 1024 / (kPositions * depth * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = kRows * ((24 + kRows - 1) / kRows);
  return budget > 2 * rows ? 2 * rows : rows;
}

// One panel of V vectors, whose weights are taps[d][q][V vectors].
template <class T, int V>
inline void pack_winograd_panel(const T* taps, int64_t depth, int64_t position, T* panel) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t d = 0; d < depth; ++d, taps += 9 * V * L, panel += V * L)
    for (int v = 0; v < V; ++v) {
      Vec<T> w[9], half[18], whole[kTileIn];
      for (int64_t q = 0; q < 9; ++q) w[q] = load<T>(taps + (q * V + v) * L);
      for (int64_t j = 0; j < 3; ++j) transform_weight<T>(w + j, 3, half + j, 3);
      for (int64_t i = 0; i < kTileIn; ++i) {
        transform_weight<T>(half + 3 * i, 1, whole, 1);
        for (int64_t j = 0; j < kTileIn; ++j)
          store<T>(panel + (i * kTileIn + j) * position + v * L, whole[j]);
      }
    }
}

// Weight j, tap q, channel d is source[j * stride_j + q * stride_q + d * stride_d].
template <class T>
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
        pack_winograd_panel<T, 2>(taps, count, position, panel + d * lanes);
      else
        pack_winograd_panel<T, 1>(taps, count, position, panel + d * lanes);
    }
  }
}

// Where a tile reads and writes: the sample, and the first row and column of its outputs.
template <class T>
struct TileAt {
  int64_t n, h, w;
  TileAt(const Winograd<T>& a, int64_t tile) {
    const int64_t rows = (a.out_h + kTileOut - 1) / kTileOut;
    const int64_t cols = (a.out_w + kTileOut - 1) / kTileOut;
    n = tile / (rows * cols);
    h = tile / cols % rows * kTileOut;
    w = tile % cols * kTileOut;
  }
};

template <class T>
int64_t winograd_tiles(const Winograd<T>& a) {
  return a.batch * ((a.out_h + kTileOut - 1) / kTileOut) * ((a.out_w + kTileOut - 1) / kTileOut);
}

// One vector of channels, or the last `count` of them, of a tile whose 36 pixels are given.
template <class T, bool Whole>
inline void input_lane(const T* const* pixel, int64_t c, int64_t count, T* out, int64_t position) {
  Vec<T> d[kTileIn], half[kPositions], whole[kTileIn];
  for (int64_t j = 0; j < kTileIn; ++j) {
    for (int64_t i = 0; i < kTileIn; ++i) {
      const T* x = pixel[i * kTileIn + j] + c;
      d[i] = Whole ? load<T>(x) : load_some<T>(x, count);
    }
    transform_input<T>(d, half + j, kTileIn);
  }
  for (int64_t i = 0; i < kTileIn; ++i) {
    transform_input<T>(half + i * kTileIn, whole, 1);
    for (int64_t j = 0; j < kTileIn; ++j) store<T>(out + (i * kTileIn + j) * position, whole[j]);
  }
}

// The 36 pixels under a tile.
template <class T>
inline void tile_pixels(const Winograd<T>& a, int64_t tile, const T** pixel) {
  const TileAt<T> at(a, tile);
  for (int64_t i = 0; i < kTileIn; ++i)
    for (int64_t j = 0; j < kTileIn; ++j) {
      const T* x = under_tap(a.input, a.in_h, a.in_w, a.depth, at.n, at.h + i - a.padding_h,
                             at.w + j - a.padding_w);
      pixel[i * kTileIn + j] = x ? x : a.zeros;
    }
}

// Inputs of tiles [begin, end), written from row `row` on of a buffer of `tiles` rows a position.
template <class T>
void winograd_input(const Winograd<T>& a, int64_t begin, int64_t end, T* inputs, int64_t row,
                    int64_t tiles) {
  constexpr int64_t L = VecOf<T>::lanes, kLine = 64 / sizeof(T);
  const int64_t stride = tile_stride<T>(a.depth), position = tiles * stride + kSkew;
  const T* pixels[2][kPositions];
  tile_pixels(a, begin, pixels[0]);
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* const* pixel = pixels[(tile - begin) % 2];
    const T** next = pixels[(tile - begin + 1) % 2];
    tile_pixels(a, min(tile + 1, end - 1), next);
    T* out = inputs + (row + tile - begin) * stride;
    int64_t c = 0;
    for (; c + L <= a.depth; c += L) {
      if (c % kLine == 0)
        for (int64_t q = 0; q < kPositions; ++q)
          if (q % kTileIn >= 2) __builtin_prefetch(next[q] + c);
      input_lane<T, true>(pixel, c, L, out + c, position);
    }
    if (c < a.depth) input_lane<T, false>(pixel, c, a.depth - c, out + c, position);
  }
}

// out[i][:] = sum over d of rows[i][d] * panel[d][:], for R rows and V vectors.
// Not inlined: its pointers are to stay in registers.
template <class T, int R, int V>
[[gnu::noinline]] void product_tile(const T* rows, int64_t stride, int64_t depth, const T* panel,
                                    T* out, int64_t out_stride) {
  constexpr int L = VecOf<T>::lanes;
  Vec<T> acc[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // Three rows a pointer: x86 addresses at base, base + stride and base + 2 * stride.
  const T* base[(R + 2) / 3];
  for (int i = 0; i < R; i += 3) base[i / 3] = rows + i * stride;
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    Vec<T> b[V];
    for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * L);
    // The next panel, which lies behind this one.
    for (int v = 0; v < V * L * int(sizeof(T)); v += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(panel + depth * V * L) + v, 0, 2);
    panel += V * L;
    for (int i = 0; i < R; ++i) {
      const T x = base[i / 3][i % 3 * stride];
      for (int v = 0; v < V; ++v) acc[i][v] += b[v] * x;
    }
    for (int i = 0; i < R; i += 3) ++base[i / 3];
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store<T>(out + i * out_stride + v * L, acc[i][v]);
}

template <class T, int V, int R = kRows>
inline void product_rows(int64_t count, const T* rows, int64_t stride, int64_t depth,
                         const T* panel, T* out, int64_t out_stride) {
  if constexpr (R > 0) {
    if (count == R)
      product_tile<T, R, V>(rows, stride, depth, panel, out, out_stride);
    else
      product_rows<T, V, R - 1>(count, rows, stride, depth, panel, out, out_stride);
  }
}

// One vector of outputs, `count` of which exist, at `element` of the image.
template <class T>
struct OutputLane {
  const Epilogue<T>* e;
  Vec<T> mask, scale, shift, bias;
  int64_t count;
  OutputLane(const Epilogue<T>* epilogue, int64_t sample, int64_t first, int64_t used)
      : e(epilogue), count(used) {
    if (!e) return;
    mask = load_some<T>(e->mask + sample * e->mask_stride + first, count);
    scale = load_some<T>(e->scale + first, count);
    shift = load_some<T>(e->shift + first, count);
    bias = load_some<T>(e->bias + first, count);
  }
  void write(T* output, int64_t element, Vec<T> u) const {
    if (e) {
      if (e->u) store_some<T>(e->u + element, u, count);
      u = mask * (scale * u + shift) + bias;
      if (e->residual) u += load_some<T>(e->residual + element, count);
      if (e->relu) u = u < T(0) ? Vec<T>{} : u;
    }
    store_some<T>(output + element, u, count);
  }
};

// Outputs of tiles [begin, end) for one group of channels, from row `row` on of the inputs.
template <class T>
void winograd_output(const Winograd<T>& a, int64_t begin, int64_t end, const T* inputs, int64_t row,
                     int64_t tiles, int64_t group, const T* packed, T* products) {
  constexpr int64_t L = VecOf<T>::lanes, kWide = Panels<T>::kWide;
  const Panels<T> shape{a.width};
  const int64_t first = group * kGroupPanels<T>;
  const int64_t last = min(shape.count(), first + kGroupPanels<T>);
  const int64_t stride = tile_stride<T>(a.depth), position = tiles * stride + kSkew;
  const int64_t count = end - begin, blocks = (count + kRows - 1) / kRows;
  const int64_t width = (last - first) * kWide;
  const int64_t product = product_position<T>(count);
  for (int64_t q = 0; q < kPositions; ++q)
    for (int64_t p = first; p < last; ++p) {
      const T* panel = packed + q * group_position<T>(a.depth) + (p - first) * a.depth * kWide;
      T* to = products + q * product + (p - first) * kWide;
      // Blocks of nearly equal height: a short last one could not hide the latency.
      for (int64_t b = 0, i = 0; b < blocks; ++b) {
        const int64_t next = (b + 1) * count / blocks;
        const T* rows = inputs + q * position + (row + i) * stride;
        if (shape.lanes(p) == kWide)
          product_rows<T, 2>(next - i, rows, stride, a.depth, panel, to + i * width, width);
        else
          product_rows<T, 1>(next - i, rows, stride, a.depth, panel, to + i * width, width);
        i = next;
      }
    }
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileAt<T> at(a, tile);
    const int64_t rows = min(kTileOut, a.out_h - at.h), cols = min(kTileOut, a.out_w - at.w);
    for (int64_t k = first * kWide; k < min(a.width, last * kWide); k += L) {
      const T* from = products + (tile - begin) * width + k - first * kWide;
      Vec<T> m[kTileIn], half[kTileOut * kTileIn], whole[kTileOut];
      for (int64_t j = 0; j < kTileIn; ++j) {
        for (int64_t i = 0; i < kTileIn; ++i) m[i] = load<T>(from + (i * kTileIn + j) * product);
        transform_output<T>(m, half + j, kTileIn);
      }
      const OutputLane<T> lane(a.epilogue, at.n, k, min(L, a.width - k));
      for (int64_t i = 0; i < rows; ++i) {
        transform_output<T>(half + i * kTileIn, whole, 1);
        const int64_t element = ((at.n * a.out_h + at.h + i) * a.out_w + at.w) * a.width + k;
        for (int64_t j = 0; j < cols; ++j) lane.write(a.output, element + j * a.width, whole[j]);
      }
    }
  }
}
