// Depthwise convolution by square kernels of stride 1 and 2, along rows of pixels, several of them
// at once: outputs below each other share what they read. Included once per instruction set; see
// isa.inl.
#pragma once

// Pixels from `at` to column `stop` of its row of the grid, and those below them in `rows` rows.
struct DepthwisePixels {
  GridPixel at;
  int64_t stop, rows;
};

// Channels [begin, end), vectors of them or less than one, of at most R rows.
template <class T, int K, int Step, int R, bool Whole>
[[gnu::noinline]] void depthwise_tile(const Direct<T>& a, const GridTaps& taps,
                                      const DepthwisePixels& pixels, int64_t begin, int64_t end) {
  constexpr int L = VecOf<T>::lanes;
  constexpr int kRead = (R - 1) * Step + K;                 // rows
  constexpr bool kKeeps = K == 3 || (K == 5 && kRows > 6);  // weights stay in registers
  constexpr int kShared = K == 3 ? K - Step : 0;            // columns too, for the next pixel
  const Epilogue<T> own = *a.epilogue;                      // no store can change it
  const GridPixel& at = pixels.at;
  const int64_t h = at.i * Step + taps.top, w = at.j * Step + taps.left, rows = pixels.rows;
  const int64_t across = a.in_stride, down = a.in_w * across, in_w = a.in_w;
  // Rows outside the image are left out; so are those that only outputs below the last row read.
  bool inside[kRead];
  for (int q = 0; q < kRead; ++q)
    inside[q] = h + q >= 0 && h + q < a.in_h && q < (rows - 1) * Step + K;
  const T* const input = a.input + ((at.n * a.in_h + h) * in_w + w) * across;
  const int64_t row = (at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h) * a.out_w;
  const int64_t next = a.out_step_w * a.out_stride, under = a.out_step_h * a.out_w * a.out_stride;
  const int64_t out = (row + a.out_origin_w + at.j * a.out_step_w) * a.out_stride;
  T* const output = a.output;
  const T* const panels = a.panels + a.panel_first * L;
  // Of the weights: from a row to the next, from a column to the next, and where the first one is.
  const int64_t step_h = taps.turned_h ? -K * L : K * L, step_w = taps.turned_w ? -L : L;
  const int64_t corner_at =
      (taps.turned_h ? K * (K - 1) * L : 0) + (taps.turned_w ? (K - 1) * L : 0);
  for (int64_t first = begin; first < end; first += L) {
    const int64_t used = Whole ? L : end - first;
    const OutputLane<T> lane(&own, at.n, first, used);
    const T* const corner = panels + first * a.panel_depth + corner_at;
    const auto weight = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
      return load<T>(corner + r * step_h + c * step_w);
    };
    const T* x = input + first;
    int64_t column = w, place = out + first, left = pixels.stop - at.j;
    const auto read = [&](int64_t q, int64_t c) __attribute__((always_inline)) {
      const T* from = x + q * down + c * across;
      return Whole ? load<T>(from) : load_some<T>(from, used);
    };
    const auto write = [&](const Vec<T>(&sums)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        if (R > 1 && k >= rows) break;
        lane.prefetch(output, place + k * under + L);
        lane.write(output, place + k * under, sums[k]);
      }
      // The next vector of channels reads what lies behind what this pixel was the first to read.
#pragma GCC unroll 16
      for (int q = 0; q < kRead; ++q)
#pragma GCC unroll 2
        for (int c = K - Step; c < K; ++c) __builtin_prefetch(x + q * down + c * across + L);
      --left, column += Step, x += Step * across, place += next;
    };
    // Column by column of the kernel; those outside the image are left out.
    const auto pixel = [&] {
      Vec<T> sums[R] = {};
      for (int64_t c = max<int64_t>(0, -column); c < min(K, in_w - column); ++c) {
        Vec<T> weights[K];
#pragma GCC unroll 8
        for (int r = 0; r < K; ++r) weights[r] = weight(r, c);
#pragma GCC unroll 16
        for (int q = 0; q < kRead; ++q) {
          if (!inside[q]) continue;
          const Vec<T> from = read(q, c);
#pragma GCC unroll 4
          for (int k = 0; k < R; ++k)
            if (const int r = q - k * Step; r >= 0 && r < K) sums[k] += from * weights[r];
        }
      }
      write(sums);
    };
    while (left > 0 && (column < 0 || !kKeeps)) pixel();
    if (kKeeps && left > 0 && column + K <= in_w) {
      Vec<T> weights[K][K], columns[kRead][K];
#pragma GCC unroll 8
      for (int r = 0; r < K; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < K; ++c) weights[r][c] = weight(r, c);
#pragma GCC unroll 16
      for (int q = 0; q < kRead; ++q)
#pragma GCC unroll 2
        for (int c = 0; c < kShared; ++c) columns[q][c + Step] = inside[q] ? read(q, c) : Vec<T>{};
      while (left > 0 && column + K <= in_w) {
        Vec<T> sums[R] = {};
#pragma GCC unroll 16
        for (int q = 0; q < kRead; ++q) {
          if (!inside[q]) continue;
#pragma GCC unroll 8
          for (int c = 0; c < K; ++c) {
            columns[q][c] = c < kShared ? columns[q][c + Step] : read(q, c);
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k)
              if (const int r = q - k * Step; r >= 0 && r < K)
                sums[k] += columns[q][c] * weights[r][c];
          }
        }
        write(sums);
      }
    }
    while (left > 0) pixel();
  }
}

template <class T, int K, int Step, int R>
inline void depthwise_channels(const Direct<T>& a, const GridTaps& taps,
                               const DepthwisePixels& pixels) {
  const int64_t whole = a.groups / VecOf<T>::lanes * VecOf<T>::lanes;
  depthwise_tile<T, K, Step, R, true>(a, taps, pixels, 0, whole);
  if (whole < a.groups) depthwise_tile<T, K, Step, R, false>(a, taps, pixels, whole, a.groups);
}

template <class T, int K, int Step>
void depthwise_pixels(const Direct<T>& a, const GridTaps& taps, int64_t begin, int64_t end) {
  constexpr int R = kRows > 6 || K > 3 ? 4 : 2;  // as many as fit the registers
  each_rows(a, begin, end, R, [&](const GridPixel& at, int64_t rows, int64_t cols) {
    const DepthwisePixels pixels{at, at.j + cols, rows};
    if (rows > 1)
      depthwise_channels<T, K, Step, R>(a, taps, pixels);
    else
      depthwise_channels<T, K, Step, 1>(a, taps, pixels);
  });
}

template <class T, int K>
inline void depthwise_steps(const Direct<T>& a, const GridTaps& taps, int64_t begin, int64_t end) {
  if (a.step_w == 1)
    depthwise_pixels<T, K, 1>(a, taps, begin, end);
  else
    depthwise_pixels<T, K, 2>(a, taps, begin, end);
}

// Pixels [begin, end), if there is a kernel for such taps.
template <class T>
bool depthwise(const Direct<T>& a, int64_t begin, int64_t end) {
  const GridTaps taps = grid_taps(a.tap_h, a.tap_w, a.taps);
  if (taps.rows != taps.cols || a.step_h != a.step_w || a.step_w > 2) return false;
  if (taps.rows == 3) return depthwise_steps<T, 3>(a, taps, begin, end), true;
  if (taps.rows == 5) return depthwise_steps<T, 5>(a, taps, begin, end), true;
  if (taps.rows == 7) return depthwise_steps<T, 7>(a, taps, begin, end), true;
  return false;
}
