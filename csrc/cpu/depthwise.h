// Depthwise convolution by 3x3 kernels of stride 1, a row of pixels at a time: a column that three
// of them read is loaded once. Included once per instruction set; see isa.inl.
#pragma once

// The taps of a 3x3 kernel without dilation: the column that is read furthest left, and whether the
// last tap of a row reads it. Not `found` for any others.
struct SquareTaps {
  bool found, reversed;
  int64_t left;
};

inline SquareTaps square_taps(const int64_t* tap_h, const int64_t* tap_w, int64_t taps) {
  if (taps != 9) return {false, false, 0};
  const int64_t step = tap_w[1] - tap_w[0];
  bool found = step == 1 || step == -1;
  for (int64_t q = 0; q < taps; ++q)
    found &= tap_h[q] == tap_h[q / 3 * 3] && tap_w[q] == tap_w[0] + q % 3 * step;
  return {found, step < 0, step < 0 ? tap_w[2] : tap_w[0]};
}

// One vector of channels, of which `used` exist, of the pixels from `at` to column `stop` of its
// row.
template <class T, bool Whole>
[[gnu::noinline]] void depthwise_row(const Direct<T>& a, const SquareTaps& taps,
                                     const GridPixel& at, int64_t stop, int64_t first, int64_t used,
                                     const T* zeros) {
  constexpr int L = VecOf<T>::lanes;
  const Epilogue<T> own = *a.epilogue;  // no store can change it
  const OutputLane<T> lane(&own, at.n, first, Whole ? L : used);
  Vec<T> weights[3][3];
  const T* rows[3];
  int64_t strides[3];
  for (int r = 0; r < 3; ++r) {
    const int64_t h = at.i * a.step_h + a.tap_h[3 * r];
    // Outside the image weights are 0 as well: an infinite one is not multiplied by 0 then.
    const bool inside = h >= 0 && h < a.in_h;
    rows[r] = inside ? a.input + (at.n * a.in_h + h) * a.in_w * a.in_stride + first : zeros;
    strides[r] = inside ? a.in_stride : 0;
    const T* panel = a.panels + first * 9 + 3 * r * L;
    for (int c = 0; c < 3; ++c)
      weights[r][c] = inside ? load<T>(panel + (taps.reversed ? 2 - c : c) * L) : Vec<T>{};
  }
  const auto read = [&](int r, int64_t column) __attribute__((always_inline)) {
    const T* x = rows[r] + column * strides[r];
    return Whole ? load<T>(x) : load_some<T>(x, used);
  };
  T* const output = a.output;
  const int64_t row = (at.n * a.out_h + a.out_origin_h + at.i * a.out_step_h) * a.out_w;
  const int64_t next = a.out_step_w * a.out_stride;
  int64_t j = at.j, column = j + taps.left;
  int64_t place = (row + a.out_origin_w + j * a.out_step_w) * a.out_stride + first;
  // Columns outside the image are left out.
  const auto edge = [&] {
    Vec<T> sum{};
    for (int c = 0; c < 3; ++c)
      if (column + c >= 0 && column + c < a.in_w)
        for (int r = 0; r < 3; ++r) sum += read(r, column + c) * weights[r][c];
    lane.write(output, place, sum);
    ++j, ++column, place += next;
  };
  while (j < stop && column < 0) edge();
  if (j < stop && column + 3 <= a.in_w) {
    Vec<T> x[3][3];
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 2; ++c) x[r][c] = read(r, column + c);
    const int64_t below = a.in_w * a.in_stride, under = a.out_step_h * a.out_w * a.out_stride;
    for (; j < stop && column + 3 <= a.in_w; ++j, ++column, place += next) {
      // What the row below writes, and is the first to read.
      __builtin_prefetch(output + place + under, 1);
      __builtin_prefetch(rows[2] + column * strides[2] + below);
      Vec<T> sum{};
      for (int r = 0; r < 3; ++r) {
        x[r][2] = read(r, column + 2);
        for (int c = 0; c < 3; ++c) sum += x[r][c] * weights[r][c];
        for (int c = 0; c < 2; ++c) x[r][c] = x[r][c + 1];
      }
      lane.write(output, place, sum);
    }
  }
  while (j < stop) edge();
}

// Pixels [begin, end), if there is a kernel for such taps.
template <class T>
bool depthwise(const Direct<T>& a, int64_t begin, int64_t end, const T* zeros) {
  constexpr int64_t L = VecOf<T>::lanes;
  const SquareTaps taps = square_taps(a.tap_h, a.tap_w, a.taps);
  if (!taps.found || a.step_h != 1 || a.step_w != 1) return false;
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t stop = min(a.cols, at.j + end - begin);
    int64_t c = 0;
    for (; c + L <= a.groups; c += L) depthwise_row<T, true>(a, taps, at, stop, c, L, zeros);
    if (c < a.groups) depthwise_row<T, false>(a, taps, at, stop, c, a.groups - c, zeros);
    begin += stop - at.j;
  }
  return true;
}
