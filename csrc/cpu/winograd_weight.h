// The gradient of a 3x3 convolution's weights in Winograd's tiles. Included once per instruction
// set; see isa.inl and docs/kernels.md.
//
// dw = Gt((A dy) * (Bt d)) is what the convolution does, transposed. Summed over tiles, each
// position is a matrix product of gradients and inputs; positions that share weights share their
// sum. Both are stored in blocks of as many channels as a unit of work has, inputs
// [block][position][panel][tile][lanes] and gradients [block][position][tile][channel], so that a
// unit reads two blocks in order.
#pragma once

// Tiles that are summed at a time: longer sums have larger rounding errors, and these stay in the
// first cache.
constexpr int64_t kSumTiles = 64;

// Elements from one position to the next: of a block for so many tiles, or of a unit's sums for so
// many neurons.
inline int64_t block_position(int64_t edge, int64_t rows) { return edge * rows + kSkew; }

template <class F>
constexpr int64_t kSums = F::kWeights * F::kWeights;

template <class F, class T = typename F::T>
WinogradWeightPlan winograd_weight_plan(const Winograd<T>& conv, int64_t l2) {
  constexpr int64_t kWide = Panels<T>::kWide;
  WinogradWeightPlan plan{};
  // Two panels, where a unit's sums then stay in the second cache.
  const int64_t bytes = kSums<F> * 4 * kWide * kWide * static_cast<int64_t>(sizeof(T));
  plan.edge = bytes <= l2 / 2 ? 2 * kWide : kWide;
  const int64_t depth_blocks = (conv.depth + plan.edge - 1) / plan.edge;
  const int64_t width_blocks = (conv.width + plan.edge - 1) / plan.edge;
  plan.units = depth_blocks * width_blocks;
  plan.sums = kSums<F>;
  plan.unit_size = kSums<F> * block_position(plan.edge, plan.edge);
  // Transformed tiles take no more memory than all sums, unless there are few channels.
  const int64_t most = conv.depth * conv.width * kSums<F> / kPositions<F>;
  plan.tiles = winograd_tiles<F>(conv);
  plan.chunk = min(plan.tiles, max(kSumTiles, most / (conv.depth + conv.width)));
  const int64_t block = kPositions<F> * block_position(plan.edge, plan.chunk);
  plan.inputs = depth_blocks * block;
  plan.grads = width_blocks * block;
  return plan;
}

// The gradients that a tile reads.
template <class F, class T = typename F::T>
inline void tile_grads(const WinogradWeightGrad<T>& a, const TileAt<F>& at, const T** grad) {
  for (int64_t i = 0; i < F::kOut; ++i)
    for (int64_t j = 0; j < F::kOut; ++j) {
      const int64_t h = at.h + i * a.conv.dilation_h, w = at.w + j * a.conv.dilation_w;
      const T* g = under_tap(a.grad, a.conv.out_h, a.conv.out_w, a.grad_stride, at.n, h, w);
      grad[i * F::kOut + j] = g ? g : a.conv.zeros;
    }
}

// One vector of neurons, or the last `count` of them, of a tile's gradients; those of the next tile
// lie `ahead` elements behind them.
template <class F, bool Whole, class T = typename F::T>
inline void grad_lane(const T* const* pixel, int64_t ahead, int64_t k, int64_t count, T* out,
                      int64_t position) {
  Vec<T> y[F::kOut], half[F::kOut * F::kPoints], column[F::kOut], whole[F::kPoints];
  for (int64_t j = 0; j < F::kOut; ++j) {
    for (int64_t i = 0; i < F::kOut; ++i) {
      const T* g = pixel[i * F::kOut + j] + k;
      __builtin_prefetch(g + ahead);
      y[i] = Whole ? load<T>(g) : load_some<T>(g, count);
    }
    F::output_transposed(y, half + j * F::kPoints);
  }
  for (int64_t i = 0; i < F::kPoints; ++i) {
    for (int64_t j = 0; j < F::kOut; ++j) column[j] = half[j * F::kPoints + i];
    F::output_transposed(column, whole);
    for (int64_t j = 0; j < F::kPoints; ++j)
      store<T>(out + (i * F::kPoints + j) * position, whole[j]);
  }
}

// Transforms tiles [begin, end), of which the buffers' first is `first`.
template <class F, class T = typename F::T>
void winograd_weight_tiles(const WinogradWeightGrad<T>& a, int64_t begin, int64_t end,
                           int64_t first, T* inputs, T* grads) {
  constexpr int64_t L = VecOf<T>::lanes, kWide = Panels<T>::kWide;
  const int64_t depth = a.conv.depth, width = a.conv.width, edge = a.plan.edge;
  const int64_t position = block_position(edge, a.plan.chunk), block = kPositions<F> * position;
  const T *input[F::kIn * F::kIn], *grad[F::kOut * F::kOut];
  TileAt<F> at(a.conv, begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileAt<F> next = at.next();
    tile_pixels(a.conv, at, input);
    tile_grads(a, at, grad);
    const int64_t inputs_ahead = inputs_between(a.conv, at, next) * a.conv.in_stride;
    const int64_t grads_ahead = outputs_between(a.conv, at, next) * a.grad_stride;
    for (int64_t c = 0; c < depth; c += L) {
      const int64_t panel = c / kWide, lane = c % kWide;
      T* out = inputs + c / edge * block + (c % edge - lane) * a.plan.chunk +
               (tile - first) * Panels<T>{depth}.lanes(panel) + lane;
      if (c + L <= depth)
        input_lane<F, true>(input, inputs_ahead, c, L, out, position);
      else
        input_lane<F, false>(input, inputs_ahead, c, depth - c, out, position);
    }
    for (int64_t k = 0; k < width; k += L) {
      T* out = grads + k / edge * block + (tile - first) * edge + k % edge;
      if (k + L <= width)
        grad_lane<F, true>(grad, grads_ahead, k, L, out, position);
      else
        grad_lane<F, false>(grad, grads_ahead, k, width - k, out, position);
    }
    at = next;
  }
}

// A unit's first neuron and input channel, and how many of them it has.
template <class T>
struct WeightUnit {
  int64_t k, c, rows, cols;
  WeightUnit(const WinogradWeightGrad<T>& a, int64_t unit) {
    const int64_t edge = a.plan.edge, depth_blocks = (a.conv.depth + edge - 1) / edge;
    k = unit / depth_blocks * edge;
    c = unit % depth_blocks * edge;
    rows = min(edge, a.conv.width - k);
    cols = min(edge, a.conv.depth - c);
  }
};

// Sums [begin, end) of a unit, over the first `tiles` of the buffers; added where `accumulate`.
template <class F, class T = typename F::T>
void winograd_weight_sums(const WinogradWeightGrad<T>& a, int64_t unit, int64_t begin, int64_t end,
                          int64_t tiles, const T* inputs, const T* grads, T* sums,
                          bool accumulate) {
  constexpr int64_t kWide = Panels<T>::kWide;
  const Panels<T> shape{a.conv.depth};
  const WeightUnit<T> at(a, unit);
  const int64_t edge = a.plan.edge, position = block_position(edge, a.plan.chunk);
  const int64_t parts = (tiles + kSumTiles - 1) / kSumTiles;
  bool begun[kSums<F>] = {};
  for (int64_t q = 0; q < kPositions<F>; ++q) {
    const int64_t sum = weight_position<F>(q);
    if (sum < begin || sum >= end) continue;
    const T* x = inputs + (at.c / edge * kPositions<F> + q) * position;
    const T* g = grads + (at.k / edge * kPositions<F> + q) * position;
    T* to = sums + sum * block_position(edge, edge);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * tiles / parts, last = (part + 1) * tiles / parts;
      const bool add = accumulate || begun[sum];
      for (int64_t c = 0; c < at.cols; c += kWide) {
        const int64_t lanes = shape.lanes((at.c + c) / kWide);
        product<T, true>(at.rows, {g + first * edge, edge}, last - first,
                         x + c * a.plan.chunk + first * lanes, lanes, to + c, edge, add);
      }
      begun[sum] = true;
    }
  }
}

// A unit's gradients from its sums.
template <class F, class T = typename F::T>
void winograd_weight_output(const WinogradWeightGrad<T>& a, int64_t unit, const T* sums) {
  constexpr int64_t L = VecOf<T>::lanes;
  const WeightUnit<T> at(a, unit);
  const int64_t edge = a.plan.edge, position = block_position(edge, edge);
  for (int64_t k = 0; k < at.rows; ++k)
    for (int64_t c = 0; c < at.cols; c += L) {
      const T* from = sums + k * edge + c;
      Vec<T> m[F::kWeights], half[3 * F::kWeights], taps[9];
      for (int64_t i = 0; i < F::kWeights; ++i) {
        for (int64_t j = 0; j < F::kWeights; ++j)
          m[j] = load<T>(from + (i * F::kWeights + j) * position);
        F::weight_transposed(m, half + 3 * i);
      }
      for (int64_t j = 0; j < 3; ++j) {
        Vec<T> column[3];
        for (int64_t i = 0; i < F::kWeights; ++i) m[i] = half[3 * i + j];
        F::weight_transposed(m, column);
        for (int64_t i = 0; i < 3; ++i) taps[3 * i + j] = column[i];
      }
      T* to = a.weight_grad + ((at.k + k) * a.conv.depth + at.c + c) * 9;
      for (int64_t j = 0; j < min(L, at.cols - c); ++j)
        for (int64_t q = 0; q < 9; ++q) to[j * 9 + q] = taps[q][j];
    }
}
