// Winograd's convolutions in tiles. Included once per instruction set; see isa.inl,
// winograd_forms.h and docs/kernels.md.
//
// Per position of a tile, the products of all tiles and channels are a matrix product:
// inputs [position][tile][depth] times weights [set][position][panel][depth][lanes].
#pragma once

template <class F>
constexpr int64_t kPositions = F::kPoints * F::kPoints;

// Where the weights of a position lie among those of all: products may share them.
template <class F>
constexpr int64_t weight_position(int64_t position) {
  return F::weight_of(position / F::kPoints) * F::kWeights + F::weight_of(position % F::kPoints);
}

// Panels whose products are kept until they become outputs: 32 channels.
template <class T>
constexpr int64_t kSetPanels = (32 + Panels<T>::kWide - 1) / Panels<T>::kWide;

template <class T>
int64_t winograd_sets(int64_t width) {
  return (Panels<T>{width}.count() + kSetPanels<T> - 1) / kSetPanels<T>;
}

// Elements from one position's weights of a whole set to the next.
template <class T>
inline int64_t set_position(int64_t depth) {
  return kSetPanels<T> * Panels<T>::kWide * depth + kSkew;
}

template <class F>
int64_t winograd_set_size(int64_t depth) {
  return F::kWeights * F::kWeights * set_position<typename F::T>(depth);
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
  return tiles * kSetPanels<T> * Panels<T>::kWide + kSkew;
}

template <class F>
int64_t winograd_product_size(int64_t tiles) {
  return kPositions<F> * product_position<typename F::T>(tiles);
}

// Inputs of a block of tiles take about a quarter of the second cache; with fewer tiles than these
// the weights would be read too often.
template <class F>
int64_t winograd_block(int64_t depth, int64_t l2) {
  using T = typename F::T;
  const int64_t budget = l2 / 4 / (kPositions<F> * depth * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = kRows * ((24 + kRows - 1) / kRows);
  return max(rows, min(4 * rows, budget / rows * rows));
}

// One panel of V vectors, whose weights are taps[d][q][V vectors].
template <class F, int V, class T = typename F::T>
inline void pack_winograd_panel(const T* taps, int64_t depth, int64_t position, T* panel) {
  constexpr int64_t L = VecOf<T>::lanes, kTaps = F::kTaps;
  for (int64_t d = 0; d < depth; ++d, taps += kTaps * kTaps * V * L, panel += V * L)
    for (int v = 0; v < V; ++v) {
      Vec<T> w[kTaps * kTaps], half[kTaps * F::kWeights], whole[F::kWeights];
      for (int64_t q = 0; q < kTaps * kTaps; ++q) w[q] = load<T>(taps + (q * V + v) * L);
      for (int64_t j = 0; j < kTaps; ++j) F::weight(w + j, kTaps, half + j, kTaps);
      for (int64_t i = 0; i < F::kWeights; ++i) {
        F::weight(half + kTaps * i, 1, whole, 1);
        for (int64_t j = 0; j < F::kWeights; ++j)
          store<T>(panel + (i * F::kWeights + j) * position + v * L, whole[j]);
      }
    }
}

template <class F, class T = typename F::T>
void winograd_pack(const Weights<T>& weights, bool rotated, int64_t depth, int64_t width,
                   int64_t set, T* packed) {
  constexpr int64_t L = VecOf<T>::lanes, kChannels = 16, kSquare = F::kTaps * F::kTaps;
  const Panels<T> shape{width};
  const int64_t first = set * kSetPanels<T>, position = set_position<T>(depth);
  const int64_t last = min(shape.count(), first + kSetPanels<T>);
  alignas(64) T taps[kChannels * kSquare * Panels<T>::kWide];
  for (int64_t p = first; p < last; ++p) {
    const int64_t lanes = shape.lanes(p);
    T* panel = packed + (p - first) * depth * Panels<T>::kWide;
    for (int64_t d = 0; d < depth; d += kChannels) {
      const int64_t count = min(kChannels, depth - d);
      for (int64_t v = 0; v < lanes; v += L) {
        Weights<T> part = weights;
        part.data += (p * Panels<T>::kWide + v) * part.stride_j + d * part.stride_d;
        read_weights<T>(
            part, min(L, shape.used(p) - v), count, [&](int64_t q, int64_t i, Vec<T> w) {
              store<T>(taps + (i * kSquare + (rotated ? kSquare - 1 - q : q)) * lanes + v, w);
            });
      }
      if (lanes == Panels<T>::kWide)
        pack_winograd_panel<F, 2>(taps, count, position, panel + d * lanes);
      else
        pack_winograd_panel<F, 1>(taps, count, position, panel + d * lanes);
    }
  }
}

// How tiles cover an axis of the outputs. With a dilation, rows that lie so far apart make an image
// of their own, for each remainder; its tiles follow each other.
template <class F>
struct TileAxis {
  int64_t size, dilation, per_image;
  TileAxis(int64_t outputs, int64_t dilation)
      : size(outputs),
        dilation(dilation),
        per_image(((outputs + dilation - 1) / dilation + F::kOut - 1) / F::kOut) {}
  int64_t count() const { return per_image * min(dilation, size); }
  // The tile's first output, and how many it has.
  int64_t first(int64_t tile) const {
    if (dilation == 1) return tile * F::kOut;
    return tile / per_image + tile % per_image * F::kOut * dilation;
  }
  int64_t outputs(int64_t first) const {
    return first < size ? min(F::kOut, (size - first + dilation - 1) / dilation) : 0;
  }
};

// Where a tile reads and writes: the sample, and the first row and column of its outputs.
template <class F, class T = typename F::T>
struct TileAt {
  TileAxis<F> rows, cols;
  int64_t n, row, col, h, w;
  TileAt(const Winograd<T>& a, int64_t tile)
      : rows(a.out_h, a.dilation_h), cols(a.out_w, a.dilation_w) {
    col = tile % cols.count(), tile /= cols.count();
    row = tile % rows.count(), n = tile / rows.count();
    h = rows.first(row), w = cols.first(col);
  }
  TileAt next() const {
    TileAt at = *this;
    if (++at.col == cols.count()) {
      at.col = 0;
      if (++at.row == rows.count()) at.row = 0, ++at.n;
      at.h = rows.first(at.row);
    }
    at.w = cols.first(at.col);
    return at;
  }
};

template <class F, class T = typename F::T>
int64_t winograd_tiles(const Winograd<T>& a) {
  return a.batch * TileAxis<F>(a.out_h, a.dilation_h).count() *
         TileAxis<F>(a.out_w, a.dilation_w).count();
}

// One vector of channels, or the last `count` of them, of a tile whose pixels are given; those of
// the next tile lie `ahead` elements behind them.
template <class F, bool Whole, class T = typename F::T>
inline void input_lane(const T* const* pixel, int64_t ahead, int64_t c, int64_t count, T* out,
                       int64_t position) {
  constexpr int64_t kKnown = F::kIn - F::first_input(F::kOut);  // columns that both tiles read
  Vec<T> d[F::kIn], half[F::kPoints * F::kIn], whole[F::kPoints];
  for (int64_t j = 0; j < F::kIn; ++j) {
    for (int64_t i = 0; i < F::kIn; ++i) {
      const T* x = pixel[i * F::kIn + j] + c;
      if (j >= kKnown) __builtin_prefetch(x + ahead);
      d[i] = Whole ? load<T>(x) : load_some<T>(x, count);
    }
    F::input(d, half + j, F::kIn);
  }
  for (int64_t i = 0; i < F::kPoints; ++i) {
    F::input(half + i * F::kIn, whole, 1);
    for (int64_t j = 0; j < F::kPoints; ++j)
      store<T>(out + (i * F::kPoints + j) * position, whole[j]);
  }
}

// The pixels under a tile.
template <class F, class T = typename F::T>
inline void tile_pixels(const Winograd<T>& a, const TileAt<F>& at, const T** pixel) {
  const int64_t h = F::first_input(at.h) - a.padding_h, w = F::first_input(at.w) - a.padding_w;
  int64_t column[F::kIn];  // or -1 where it is outside
  for (int64_t j = 0, x = w; j < F::kIn; ++j, x += a.dilation_w)
    column[j] = x >= 0 && x < a.in_w ? x : -1;
  for (int64_t i = 0, y = h; i < F::kIn; ++i, y += a.dilation_h) {
    const bool is_row = y >= 0 && y < a.in_h;
    const int64_t row = (at.n * a.in_h + y) * a.in_w;
    for (int64_t j = 0; j < F::kIn; ++j)
      pixel[i * F::kIn + j] =
          is_row && column[j] >= 0 ? a.input + (row + column[j]) * a.in_stride : a.zeros;
  }
}

// Pixels of outputs from a tile to another one.
template <class F>
inline int64_t outputs_between(const Winograd<typename F::T>& a, const TileAt<F>& at,
                               const TileAt<F>& other) {
  return ((other.n - at.n) * a.out_h + other.h - at.h) * a.out_w + other.w - at.w;
}

// Pixels of inputs from a tile to another one.
template <class F>
inline int64_t inputs_between(const Winograd<typename F::T>& a, const TileAt<F>& at,
                              const TileAt<F>& other) {
  const int64_t h = F::first_input(other.h) - F::first_input(at.h);
  const int64_t w = F::first_input(other.w) - F::first_input(at.w);
  return ((other.n - at.n) * a.in_h + h) * a.in_w + w;
}

// Inputs of tiles [begin, end), written from row `row` on of a buffer of `tiles` rows a position.
template <class F, class T = typename F::T>
void winograd_input(const Winograd<T>& a, int64_t begin, int64_t end, T* inputs, int64_t row,
                    int64_t tiles) {
  constexpr int64_t L = VecOf<T>::lanes;
  const int64_t stride = skewed<T>(a.in_depth), position = input_position<T>(a.in_depth, tiles);
  const T* pixel[F::kIn * F::kIn];
  TileAt<F> at(a, begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileAt<F> next = at.next();
    const int64_t ahead = inputs_between(a, at, next) * a.in_stride;
    tile_pixels(a, at, pixel);
    T* out = inputs + (row + tile - begin) * stride;
    int64_t c = 0;
    for (; c + L <= a.in_depth; c += L) input_lane<F, true>(pixel, ahead, c, L, out + c, position);
    if (c < a.in_depth) input_lane<F, false>(pixel, ahead, c, a.in_depth - c, out + c, position);
    at = next;
  }
}

// Outputs of tiles [begin, end) for one set of channels, from row `row` on of the inputs.
template <class F, class T = typename F::T>
void winograd_output(const Winograd<T>& a, int64_t begin, int64_t end, const T* inputs, int64_t row,
                     int64_t tiles, int64_t set, const T* packed, T* products) {
  constexpr int64_t L = VecOf<T>::lanes, kWide = Panels<T>::kWide;
  const Panels<T> shape{a.width};
  const int64_t first = set * kSetPanels<T>;
  const int64_t last = min(shape.count(), first + kSetPanels<T>);
  const int64_t stride = skewed<T>(a.in_depth), position = input_position<T>(a.in_depth, tiles);
  const int64_t count = end - begin;
  const int64_t width = (last - first) * kWide;
  const int64_t out_position = product_position<T>(count);
  for (int64_t q = 0; q < kPositions<F>; ++q)
    for (int64_t p = first; p < last; ++p) {
      const T* panel =
          packed + weight_position<F>(q) * set_position<T>(a.depth) + (p - first) * a.depth * kWide;
      T* to = products + q * out_position + (p - first) * kWide;
      product<T>(count, {inputs + q * position + row * stride, stride}, a.depth, panel,
                 shape.lanes(p), to, width);
    }
  const Epilogue<T> own = *a.epilogue;  // no store can change it
  TileAt<F> at(a, begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t rows = at.rows.outputs(at.h), cols = at.cols.outputs(at.w);
    const int64_t right = a.dilation_w * a.out_stride;
    const TileAt<F> next = at.next();
    // From the tile's pixels to those of the next one.
    const int64_t ahead = outputs_between(a, at, next) * a.out_stride;
    for (int64_t k = first * kWide; k < min(a.width, last * kWide); k += L) {
      const T* from = products + (tile - begin) * width + k - first * kWide;
      Vec<T> m[F::kPoints], half[F::kOut * F::kPoints], whole[F::kOut];
      for (int64_t j = 0; j < F::kPoints; ++j) {
        for (int64_t i = 0; i < F::kPoints; ++i)
          m[i] = load<T>(from + (i * F::kPoints + j) * out_position);
        F::output(m, half + j, F::kPoints);
      }
      const OutputLane<T> lane(&own, at.n, k, min(L, a.width - k));
      for (int64_t i = 0; i < rows; ++i) {
        F::output(half + i * F::kPoints, whole, 1);
        const int64_t row = at.n * a.out_h + at.h + i * a.dilation_h;
        const int64_t element = (row * a.out_w + at.w) * a.out_stride + k;
        for (int64_t j = 0; j < cols; ++j) lane.prefetch(a.output, element + j * right + ahead);
        for (int64_t j = 0; j < cols; ++j) lane.write(a.output, element + j * right, whole[j]);
      }
    }
    at = next;
  }
}
