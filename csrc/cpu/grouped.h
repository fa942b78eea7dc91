// Convolution in groups along rows of pixels: a block of outputs, several rows and columns of them,
// shares what it reads. Included once per instruction set; see isa.inl.
#pragma once

// Rows and columns of a block of sums, as many as fit the registers, and what is read for them.
constexpr int kBlockRows = 4, kBlockCols = kRows > 6 ? 4 : 2;

template <int KH, int KW, int S>
struct BlockKernel {
  static constexpr int kHeight = KH, kWidth = KW, kStep = S;
  static constexpr int kReads = (kBlockRows - 1) * S + KH;  // rows
};

// Vectors of channels that a group reads; groups that share a vector read the one they are in.
template <class T>
inline int64_t strip_vectors(const Direct<T>& a) {
  constexpr int64_t L = VecOf<T>::lanes;
  return is_narrow<T>(a.groups, a.depth, a.width) ? 1 : (a.depth + L - 1) / L;
}

// Columns of outputs whose inputs stay in the first cache, whole blocks of them.
template <class K, class T>
inline int64_t strip_columns(const Direct<T>& a) {
  const int64_t column = K::kReads * strip_vectors(a) * VecOf<T>::lanes * int64_t(sizeof(T));
  const int64_t most = (a.l1 / 2 / column - K::kWidth) / K::kStep / kBlockCols * kBlockCols;
  const int64_t all = (a.cols + kBlockCols - 1) / kBlockCols * kBlockCols;
  return min(all, max<int64_t>(kBlockCols, most));
}

// What a strip of outputs reads, copied: [vector][row][column][lanes]. Rows and columns outside the
// image are neither written nor read.
template <class T>
struct Strip {
  T* data;
  int64_t cols, rows;
  int64_t left, right;  // columns [left, right) are inside
  uint32_t inside;      // a bit for each row that is, and that an output reads

  // Channels [first, first + depth) from pixel (h, w) on.
  void read(const Direct<T>& a, int64_t n, int64_t h, int64_t w, int64_t used_rows, int64_t first,
            int64_t depth) {
    constexpr int64_t L = VecOf<T>::lanes;
    left = max<int64_t>(0, -w), right = min(cols, a.in_w - w);
    inside = 0;
    for (int64_t q = 0; q < used_rows; ++q) {
      if (h + q < 0 || h + q >= a.in_h) continue;
      inside |= 1u << q;
      for (int64_t c = 0; c < depth; c += L) {
        T* to = data + (c / L * rows + q) * cols * L;
        const T* from = a.input + ((n * a.in_h + h + q) * a.in_w + w) * a.in_stride + first + c;
        const int64_t count = min(L, depth - c);
        for (int64_t j = left; j < right; ++j) {
          // The next vector of channels lies behind this one.
          __builtin_prefetch(from + j * a.in_stride + L);
          store<T>(to + j * L, load_some<T>(from + j * a.in_stride, count));
        }
      }
    }
  }
  // Whether all of `count` columns from `first` on are inside.
  bool has_columns(int64_t first, int64_t count) const {
    return first >= left && first + count <= right;
  }
  // A bit for each of 32 columns from `first` on that is inside.
  uint32_t columns(int64_t first) const {
    const int64_t from = min(32, max<int64_t>(0, left - first));
    const int64_t to = max(from, min(32, right - first));
    return static_cast<uint32_t>((uint64_t{1} << to) - (uint64_t{1} << from));
  }
};

// Weights of a vector of outputs; elements from a channel, row and column of the kernel to the
// next.
template <class T>
struct BlockWeights {
  const T* first;
  int64_t next_d, next_h, next_w;
};

// Where a block is written.
struct BlockPlace {
  int64_t element, right, down;
  int64_t rows;
};

// W: channels of each of the groups that share a vector; 0 where a group's outputs fill it.
// Whole: all columns are inside the image and all rows are written, so that none is asked for.
template <class T, class K, int W, int C, bool Whole>
[[gnu::noinline]] void grouped_block(const Strip<T>& strip, int64_t column, int64_t depth,
                                     const BlockWeights<T>& weights, const OutputLane<T>& lane,
                                     T* output, const BlockPlace& place) {
  constexpr int L = VecOf<T>::lanes, R = kBlockRows;
  // Columns of the kernel whose weights are in registers at a time.
  constexpr int S = kRows > 6 ? K::kWidth : 1;
  Vec<T> acc[R][C];
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[k][j] = Vec<T>{};
  // Of each lane's own group, the channel that is multiplied.
  Compared<T> channel{};
  if constexpr (W > 0)
    for (int j = 0; j < L; ++j) channel[j] = j / W * W;
  const int64_t row = strip.cols * L, rows = place.rows;
  const uint32_t inside = strip.inside, columns = strip.columns(column);
  const T* panel = weights.first;
  for (int64_t from = 0; from < depth; from += L) {
    const T* x = strip.data + from * strip.rows * strip.cols + column * L;
    for (int64_t d = min(L, depth - from); d > 0; --d, panel += weights.next_d) {
#pragma GCC unroll 4
      for (int s0 = 0; s0 < K::kWidth; s0 += S) {
        Vec<T> w[K::kHeight][S];
#pragma GCC unroll 4
        for (int r = 0; r < K::kHeight; ++r)
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s)
            w[r][s] = load<T>(panel + r * weights.next_h + (s0 + s) * weights.next_w);
#pragma GCC unroll 16
        for (int q = 0; q < K::kReads; ++q) {
          if (!(inside >> q & 1)) continue;
#pragma GCC unroll 16
          for (int c = s0; c < s0 + S + (C - 1) * K::kStep; ++c) {
            if (S == 1 && (c - s0) % K::kStep) continue;
            if (!Whole && !(columns >> c & 1)) continue;
            const T* at = x + q * row + c * L;
            Vec<T> in;
            if constexpr (W > 0)
              in = __builtin_shuffle(load<T>(at), channel);
            else
              in = *at - Vec<T>{};  // a broadcast; 0 + x would be a sum, for -0
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k) {
              if (!Whole && k > 0 && k >= rows) break;
#pragma GCC unroll 4
              for (int j = 0; j < C; ++j) {
                const int r = q - k * K::kStep, s = c - s0 - j * K::kStep;
                if (r >= 0 && r < K::kHeight && s >= 0 && s < S) acc[k][j] += in * w[r][s];
              }
            }
          }
        }
      }
      if constexpr (W > 0)
        channel += 1;
      else
        ++x;
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k) {
    if (!Whole && k >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j)
      lane.write(output, place.element + k * place.down + j * place.right, acc[k][j]);
  }
}

template <class T, class K, int W, int C = kBlockCols>
inline void grouped_columns(int64_t cols, const Strip<T>& strip, int64_t column, int64_t depth,
                            const BlockWeights<T>& weights, const OutputLane<T>& lane, T* output,
                            const BlockPlace& place) {
  if constexpr (C > 0) {
    if (cols < C)
      grouped_columns<T, K, W, C - 1>(cols, strip, column, depth, weights, lane, output, place);
    else if (C == kBlockCols && place.rows == kBlockRows &&
             strip.has_columns(column, (C - 1) * K::kStep + K::kWidth))
      grouped_block<T, K, W, C, C == kBlockCols>(strip, column, depth, weights, lane, output,
                                                 place);
    else
      grouped_block<T, K, W, C, false>(strip, column, depth, weights, lane, output, place);
  }
}

// A vector of outputs, or the part of one that a group has: the v-th one.
template <class T, int W>
struct GroupedOutputs {
  static constexpr int64_t L = VecOf<T>::lanes;
  int64_t group, part, first, used;
  GroupedOutputs(const Direct<T>& a, int64_t v)
      : group(W > 0 ? 0 : v / of_group(a)), part(W > 0 ? v : v % of_group(a)) {
    first = group * a.width + part * L;
    used = min(L, (W > 0 ? a.groups * a.width : a.width) - part * L);
  }
  static int64_t of_group(const Direct<T>& a) { return (a.width + L - 1) / L; }
  static int64_t count(const Direct<T>& a) {
    return W > 0 ? (a.groups * a.width + L - 1) / L : a.groups * of_group(a);
  }
  // The first of a group's, which reads the same as the others.
  bool is_first() const { return W > 0 || part == 0; }

  template <class K>
  BlockWeights<T> weights(const Direct<T>& a, const GridTaps& taps) const {
    const Panels<T> shape{a.width};
    const int64_t size = a.panel_depth, panel = part / 2;
    const int64_t lanes = W > 0 ? L : shape.lanes(panel);
    BlockWeights<T> w{a.panels + a.panel_first * lanes, lanes, K::kWidth * a.depth * lanes,
                      a.depth * lanes};
    if constexpr (W > 0)
      w.first += first * size;
    else
      w.first += (group * shape.padded() + panel * shape.kWide) * size + part % 2 * L;
    if (taps.turned_h) w.first += (K::kHeight - 1) * w.next_h, w.next_h *= -1;
    if (taps.turned_w) w.first += (K::kWidth - 1) * w.next_w, w.next_w *= -1;
    return w;
  }
};

// All channels of `rows` rows and `cols` columns of the grid from `at` on.
template <class T, class K, int W>
void grouped_strip(const Direct<T>& a, const GridTaps& taps, const GridPixel& at, int64_t rows,
                   int64_t cols, T* memory) {
  const Epilogue<T> own = *a.epilogue;  // no store can change it
  const int64_t h = at.i * K::kStep + taps.top, w = at.j * K::kStep + taps.left;
  const int64_t out_row = at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h;
  const int64_t out = (out_row * a.out_w + a.out_origin_w + at.j * a.out_step_w) * a.out_stride;
  const int64_t right = a.out_step_w * a.out_stride, down = a.out_step_h * a.out_w * a.out_stride;
  Strip<T> strip{memory, (cols - 1) * K::kStep + K::kWidth, K::kReads, 0, 0, 0};
  for (int64_t v = 0; v < GroupedOutputs<T, W>::count(a); ++v) {
    const GroupedOutputs<T, W> outputs(a, v);
    if (outputs.is_first())
      strip.read(a, at.n, h, w, (rows - 1) * K::kStep + K::kHeight,
                 W > 0 ? outputs.first : outputs.group * a.depth, W > 0 ? outputs.used : a.depth);
    const BlockWeights<T> weights = outputs.template weights<K>(a, taps);
    const OutputLane<T> lane(&own, at.n, outputs.first, outputs.used);
    for (int64_t j = 0; j < cols; j += kBlockCols) {
      const BlockPlace place{out + j * right + outputs.first, right, down, rows};
      grouped_columns<T, K, W>(cols - j, strip, j * K::kStep, a.depth, weights, lane, a.output,
                               place);
    }
  }
}

template <class T, class K, int W = 0>
void grouped_pixels(const Direct<T>& a, const GridTaps& taps, int64_t begin, int64_t end,
                    T* memory) {
  const int64_t most = strip_columns<K>(a);
  each_rows(a, begin, end, kBlockRows, [&](GridPixel at, int64_t rows, int64_t cols) {
    for (; cols > 0; at.j += most, cols -= most)
      grouped_strip<T, K, W>(a, taps, at, rows, min(most, cols), memory);
  });
}

template <class T, class K, int W = 2>
void grouped_of(const Direct<T>& a, const GridTaps& taps, int64_t begin, int64_t end, T* memory) {
  constexpr int L = VecOf<T>::lanes;
  if (!is_narrow<T>(a.groups, a.depth, a.width))
    return grouped_pixels<T, K>(a, taps, begin, end, memory);
  if constexpr (W < L) {
    if (a.width == W) return grouped_pixels<T, K, W>(a, taps, begin, end, memory);
    grouped_of<T, K, 2 * W>(a, taps, begin, end, memory);
  }
}

// Calls use(BlockKernel) with the kernel of such taps; returns whether there is one.
template <class T, class Use>
inline bool with_block_kernel(const Direct<T>& a, const GridTaps& taps, Use use) {
  if (a.groups == 1 || a.step_h != a.step_w || a.taps * a.depth > kLongestSum) return false;
  // Vectors of 16 bytes have no fast way to move lanes.
  const bool narrow = is_narrow<T>(a.groups, a.depth, a.width);
  if (narrow && (a.width == 1 || MNP_VEC_BYTES < 32)) return false;
  const auto is = [&](int64_t rows, int64_t cols, int64_t step) {
    return taps.rows == rows && taps.cols == cols && a.step_h == step;
  };
  if (is(3, 3, 1)) return use(BlockKernel<3, 3, 1>{}), true;
  if (is(3, 3, 2)) return use(BlockKernel<3, 3, 2>{}), true;
  if (is(2, 2, 1)) return use(BlockKernel<2, 2, 1>{}), true;
  if (is(2, 1, 1)) return use(BlockKernel<2, 1, 1>{}), true;
  if (is(1, 2, 1)) return use(BlockKernel<1, 2, 1>{}), true;
  if (is(1, 1, 1)) return use(BlockKernel<1, 1, 1>{}), true;
  return false;
}

// Whether there is a kernel for such taps.
template <class T>
bool is_grouped(const Direct<T>& a) {
  return with_block_kernel(a, grid_taps(a.tap_h, a.tap_w, a.taps), [](auto) {});
}

// Whether it uses more than half of the lanes.
template <class T>
bool fills_vectors(const Direct<T>& a) {
  return is_grouped(a) &&
         (is_narrow<T>(a.groups, a.depth, a.width) || 2 * a.width > VecOf<T>::lanes);
}

template <class T>
int64_t grouped_scratch(const Direct<T>& a) {
  int64_t columns = 0;
  with_block_kernel(a, grid_taps(a.tap_h, a.tap_w, a.taps), [&](auto kernel) {
    typedef decltype(kernel) K;
    columns = (strip_columns<K>(a) * K::kStep + K::kWidth - 1) * K::kReads;
  });
  return columns * strip_vectors(a) * VecOf<T>::lanes * int64_t(sizeof(T));
}

// Grid pixels [begin, end).
template <class T>
void grouped(const Direct<T>& a, int64_t begin, int64_t end, char* memory) {
  const GridTaps taps = grid_taps(a.tap_h, a.tap_w, a.taps);
  with_block_kernel(a, taps, [&](auto kernel) {
    grouped_of<T, decltype(kernel)>(a, taps, begin, end, reinterpret_cast<T*>(memory));
  });
}
