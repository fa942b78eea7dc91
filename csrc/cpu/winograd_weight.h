// The gradient of a 3x3 convolution's weights in Winograd's tiles. Included once per instruction
// set; see isa.inl and docs/kernels.md.
//
// In one dimension dw = Gt((A dy) * (Bt d)): what the convolution does, transposed. Summed over
// tiles, each position is a matrix product of gradients and inputs. Both are stored in blocks of as
// many channels as a unit of work has, inputs [block][position][panel][tile][lanes] and gradients
// [block][position][tile][channel], so that a unit reads two blocks in order.
#pragma once

// Tiles that are summed at a time: longer sums have larger rounding errors, and these stay in the
// first cache.
constexpr int64_t kSumTiles = 64;

// Channels of a unit on either side: its sums take about half of the second cache.
template <class F, class T = typename F::T>
inline int64_t winograd_edge(int64_t l2) {
  constexpr int64_t kWide = Panels<T>::kWide;
  int64_t edge = kWide;
  while (kPositions<F> * (edge + kWide) * (edge + kWide) * int64_t(sizeof(T)) <= l2 / 2)
    edge += kWide;
  return edge;
}

// Elements from one position of a block of channels to the next, for so many tiles or, of a unit's
// sums, channels of the gradient.
inline int64_t block_position(int64_t edge, int64_t rows) { return edge * rows + kSkew; }

template <class F, class T = typename F::T>
WinogradPlan winograd_plan(const WinogradWeightGrad<T>& a) {
  const int64_t edge = winograd_edge<F>(a.l2), depth = a.conv.depth, width = a.conv.width;
  const int64_t depth_blocks = (depth + edge - 1) / edge, width_blocks = (width + edge - 1) / edge;
  WinogradPlan plan{};
  // Transformed tiles take no more memory than all sums, unless there are few channels.
  plan.tiles =
      min(winograd_tiles<F>(a.conv), max<int64_t>(kSumTiles, depth * width / (depth + width)));
  const int64_t block = kPositions<F> * block_position(edge, plan.tiles);
  plan.inputs = depth_blocks * block;
  plan.grads = width_blocks * block;
  plan.positions = kPositions<F>;
  plan.units = depth_blocks * width_blocks;
  plan.sums = kPositions<F> * block_position(edge, edge);
  return plan;
}

// One vector of gradients of a tile whose pixels are given.
template <class F, bool Whole, class T = typename F::T>
inline void grad_lane(const T* const* pixel, int64_t k, int64_t count, T* out, int64_t position) {
  Vec<T> y[F::kOut], half[F::kIn * F::kOut], whole[F::kIn];
  for (int64_t j = 0; j < F::kOut; ++j) {
    for (int64_t i = 0; i < F::kOut; ++i) {
      const T* g = pixel[i * F::kOut + j] + k;
      y[i] = Whole ? load<T>(g) : load_some<T>(g, count);
    }
    F::output_transposed(y, half + j, F::kOut);
  }
  for (int64_t i = 0; i < F::kIn; ++i) {
    F::output_transposed(half + i * F::kOut, whole, 1);
    for (int64_t j = 0; j < F::kIn; ++j) store<T>(out + (i * F::kIn + j) * position, whole[j]);
  }
}

// The gradients under a tile.
template <class F, class T = typename F::T>
inline void tile_grads(const WinogradWeightGrad<T>& a, int64_t tile, const T** pixel) {
  const TileAt<F> at(a.conv, tile);
  for (int64_t i = 0; i < F::kOut; ++i)
    for (int64_t j = 0; j < F::kOut; ++j) {
      const T* g =
          under_tap(a.grad, a.conv.out_h, a.conv.out_w, a.grad_stride, at.n, at.h + i, at.w + j);
      pixel[i * F::kOut + j] = g ? g : a.conv.zeros;
    }
}

// Tiles [begin, end), of which `first` is the first in the buffers.
template <class F, class T = typename F::T>
void winograd_weight_tiles(const WinogradWeightGrad<T>& a, int64_t begin, int64_t end,
                           int64_t first, T* inputs, T* grads) {
  constexpr int64_t L = VecOf<T>::lanes, kWide = Panels<T>::kWide;
  const Panels<T> shape{a.conv.depth};
  const WinogradPlan plan = winograd_plan<F>(a);
  const int64_t edge = winograd_edge<F>(a.l2), position = block_position(edge, plan.tiles);
  const T *pixel[kPositions<F>], *grad[F::kOut * F::kOut];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile - first;
    tile_pixels<F>(a.conv, tile, pixel);
    for (int64_t c = 0; c < a.conv.depth; c += L) {
      T* panel =
          inputs + c / edge * kPositions<F> * position + c % edge / kWide * kWide * plan.tiles;
      T* out = panel + row * shape.lanes(c / kWide) + c % kWide;
      if (c + L <= a.conv.depth)
        input_lane<F, true>(pixel, c, L, out, position);
      else
        input_lane<F, false>(pixel, c, a.conv.depth - c, out, position);
    }
    tile_grads<F>(a, tile, grad);
    for (int64_t k = 0; k < a.conv.width; k += L) {
      T* out = grads + k / edge * kPositions<F> * position + row * edge + k % edge;
      if (k + L <= a.conv.width)
        grad_lane<F, true>(grad, k, L, out, position);
      else
        grad_lane<F, false>(grad, k, a.conv.width - k, out, position);
    }
  }
}

// Which channels a unit has.
template <class F, class T = typename F::T>
struct WeightUnit {
  int64_t edge, k, c, rows, cols;
  WeightUnit(const WinogradWeightGrad<T>& a, int64_t unit) : edge(winograd_edge<F>(a.l2)) {
    const int64_t depth_blocks = (a.conv.depth + edge - 1) / edge;
    k = unit / depth_blocks * edge, c = unit % depth_blocks * edge;
    rows = min(edge, a.conv.width - k), cols = min(edge, a.conv.depth - c);
  }
};

// Sums over the first `tiles` of the buffers for positions [begin, end) of a unit.
template <class F, class T = typename F::T>
void winograd_weight_sums(const WinogradWeightGrad<T>& a, int64_t unit, int64_t begin, int64_t end,
                          int64_t tiles, const T* inputs, const T* grads, T* sums,
                          bool accumulate) {
  constexpr int64_t kWide = Panels<T>::kWide;
  const Panels<T> shape{a.conv.depth};
  const WeightUnit<F> at(a, unit);
  const int64_t rows = winograd_plan<F>(a).tiles, position = block_position(at.edge, rows);
  const int64_t parts = (tiles + kSumTiles - 1) / kSumTiles;
  for (int64_t q = begin; q < end; ++q) {
    const T* x = inputs + (at.c / at.edge * kPositions<F> + q) * position;
    const T* g = grads + (at.k / at.edge * kPositions<F> + q) * position;
    T* sum = sums + q * block_position(at.edge, at.edge);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * tiles / parts, last = (part + 1) * tiles / parts;
      for (int64_t c = 0; c < at.cols; c += kWide) {
        const int64_t lanes = shape.lanes((at.c + c) / kWide);
        product<T, true>(at.rows, {g + first * at.edge, at.edge}, last - first,
                         x + c * rows + first * lanes, lanes, sum + c, at.edge,
                         accumulate || part > 0);
      }
    }
  }
}

// A unit's gradients from its sums.
template <class F, class T = typename F::T>
void winograd_weight_output(const WinogradWeightGrad<T>& a, int64_t unit, const T* sums) {
  constexpr int64_t L = VecOf<T>::lanes;
  const WeightUnit<F> at(a, unit);
  const int64_t position = block_position(at.edge, at.edge);
  for (int64_t k = 0; k < at.rows; ++k)
    for (int64_t c = 0; c < at.cols; c += L) {
      const T* from = sums + k * at.edge + c;
      Vec<T> m[F::kIn], half[3 * F::kIn], taps[9];
      for (int64_t j = 0; j < F::kIn; ++j) {
        for (int64_t i = 0; i < F::kIn; ++i) m[i] = load<T>(from + (i * F::kIn + j) * position);
        F::weight_transposed(m, half + j, F::kIn);
      }
      for (int64_t i = 0; i < 3; ++i) F::weight_transposed(half + i * F::kIn, taps + 3 * i, 1);
      T* to = a.weight_grad + ((at.k + k) * a.conv.depth + at.c + c) * 9;
      for (int64_t j = 0; j < min(L, at.cols - c); ++j)
        for (int64_t q = 0; q < 9; ++q) to[j * 9 + q] = taps[q][j];
    }
}
