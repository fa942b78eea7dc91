// Depthwise convolution by 3x3 kernels of stride 1 and 2, along rows of pixels: what outputs next
// to each other read is loaded once. Included once per instruction set; see isa.inl.
#pragma once

// The taps of a 3x3 kernel without dilation: the row and the column that are read first, and
// whether the kernel's last row or column reads them. Not `found` for any others.
struct SquareTaps {
  bool found, turned_h, turned_w;
  int64_t top, left;
};

inline SquareTaps square_taps(const int64_t* tap_h, const int64_t* tap_w, int64_t taps) {
  if (taps != 9) return {};
  const int64_t down = tap_h[3] - tap_h[0], right = tap_w[1] - tap_w[0];
  bool found = (down == 1 || down == -1) && (right == 1 || right == -1);
  for (int64_t q = 0; q < taps; ++q)
    found &= tap_h[q] == tap_h[0] + q / 3 * down && tap_w[q] == tap_w[0] + q % 3 * right;
  return {found, down < 0, right < 0, min(tap_h[0], tap_h[8]), min(tap_w[0], tap_w[8])};
}

// Channels [begin, end), vectors of them or less than one, of R rows of the grid, from the pixel
// `at` to column `stop`. Only the first and the last row that they read may lie outside the image,
// or any where R is 1.
template <class T, int Step, int R, bool Whole>
[[gnu::noinline]] void depthwise_tile(const Direct<T>& a, const SquareTaps& taps,
                                      const GridPixel& at, int64_t stop, int64_t begin,
                                      int64_t end) {
  constexpr int L = VecOf<T>::lanes;
  constexpr int kRead = (R - 1) * Step + 3;  // rows
  constexpr int kShared = 3 - Step;          // columns that the next pixel reads too
  const Epilogue<T> own = *a.epilogue;       // no store can change it
  const int64_t h = at.i * Step + taps.top, w = at.j * Step + taps.left;
  const int64_t across = a.in_stride, down = a.in_w * across, in_w = a.in_w, pixels = stop - at.j;
  bool inside[kRead];
  for (int q = 0; q < kRead; ++q) inside[q] = h + q >= 0 && h + q < a.in_h;
  const T* const input = a.input + ((at.n * a.in_h + h) * in_w + w) * across;
  const int64_t row = (at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h) * a.out_w;
  const int64_t next = a.out_step_w * a.out_stride, under = a.out_step_h * a.out_w * a.out_stride;
  const int64_t out = (row + a.out_origin_w + at.j * a.out_step_w) * a.out_stride;
  T* const output = a.output;
  const T* const panels = a.panels;
  const bool turned_h = taps.turned_h, turned_w = taps.turned_w;
  for (int64_t first = begin; first < end; first += L) {
    const int64_t used = Whole ? L : end - first;
    const OutputLane<T> lane(&own, at.n, first, used);
    Vec<T> weights[3][3];
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c)
        weights[r][c] =
            load<T>(panels + first * 9 + (3 * (turned_h ? 2 - r : r) + (turned_w ? 2 - c : c)) * L);
    const T* x = input + first;
    int64_t column = w, place = out + first, left = pixels;
    const auto read = [&](int q, int c) __attribute__((always_inline)) {
      const T* from = x + q * down + c * across;
      // The next vector of channels reads what lies behind it.
      __builtin_prefetch(from + L);
      return Whole ? load<T>(from) : load_some<T>(from, used);
    };
    // One pixel of each row: `column_of` gives the three columns of a row that is read.
    const auto pixel = [&](auto column_of) __attribute__((always_inline)) {
      Vec<T> sums[R] = {};
#pragma GCC unroll 9
      for (int q = 0; q < kRead; ++q) {
        if ((R == 1 || q == 0 || q == kRead - 1) && !inside[q]) continue;
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c)
          column_of(q, c, [&](Vec<T> from) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int k = 0; k < R; ++k)
              if (const int r = q - k * Step; r >= 0 && r < 3) sums[k] += from * weights[r][c];
          });
      }
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        lane.prefetch(output, place + k * under + L);
        lane.write(output, place + k * under, sums[k]);
      }
      --left, column += Step, x += Step * across, place += next;
    };
    // Columns outside the image are left out.
    const auto edge = [&](int q, int c, auto add) {
      if (column + c >= 0 && column + c < in_w) add(read(q, c));
    };
    while (left > 0 && column < 0) pixel(edge);
    if (left > 0 && column + 3 <= in_w) {
      Vec<T> columns[kRead][3];
#pragma GCC unroll 9
      for (int q = 0; q < kRead; ++q)
#pragma GCC unroll 2
        for (int c = 0; c < kShared; ++c) columns[q][c + Step] = inside[q] ? read(q, c) : Vec<T>{};
      while (left > 0 && column + 3 <= in_w)
        pixel([&](int q, int c, auto add) __attribute__((always_inline)) {
          columns[q][c] = c < kShared ? columns[q][c + Step] : read(q, c);
          add(columns[q][c]);
        });
    }
    while (left > 0) pixel(edge);
  }
}

// All channels of R rows.
template <class T, int Step, int R>
void depthwise_rows(const Direct<T>& a, const SquareTaps& taps, const GridPixel& at, int64_t stop) {
  const int64_t whole = a.groups / VecOf<T>::lanes * VecOf<T>::lanes;
  depthwise_tile<T, Step, R, true>(a, taps, at, stop, 0, whole);
  if (whole < a.groups) depthwise_tile<T, Step, R, false>(a, taps, at, stop, whole, a.groups);
}

// Pixels [begin, end), R rows at a time where they are whole.
template <class T, int Step, int R>
void depthwise_pixels(const Direct<T>& a, const SquareTaps& taps, int64_t begin, int64_t end) {
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t h = at.i * Step + taps.top, stop = min(a.cols, at.j + end - begin);
    const bool whole = at.j == 0 && at.i + R <= a.rows && end - begin >= R * a.cols;
    if (R > 1 && whole && h >= -1 && h + (R - 1) * Step + 2 <= a.in_h) {
      depthwise_rows<T, Step, R>(a, taps, at, stop);
      begin += R * a.cols;
    } else {
      depthwise_rows<T, Step, 1>(a, taps, at, stop);
      begin += stop - at.j;
    }
  }
}

// Pixels [begin, end), if there is a kernel for such taps.
template <class T>
bool depthwise(const Direct<T>& a, int64_t begin, int64_t end) {
  constexpr int R = kRows > 6 ? 4 : 2;  // as many as fit the registers
  const SquareTaps taps = square_taps(a.tap_h, a.tap_w, a.taps);
  if (!taps.found || a.step_h != a.step_w || a.step_w > 2) return false;
  if (a.step_w == 1) depthwise_pixels<T, 1, R>(a, taps, begin, end);
  if (a.step_w == 2) depthwise_pixels<T, 2, R>(a, taps, begin, end);
  return true;
}
