// Where the pixels of a convolution are read and written. Included once per instruction set; see
// isa.inl.
#pragma once

// Where a grid pixel reads and writes.
struct GridPixel {
  int64_t n, i, j;
  GridPixel(int64_t p, int64_t rows, int64_t cols)
      : n(p / (rows * cols)), i(p / cols % rows), j(p % cols) {}
};

// The input pixel under one tap of a grid pixel, or null outside the image.
template <class T>
inline const T* under_tap(const T* input, int64_t in_h, int64_t in_w, int64_t stride, int64_t n,
                          int64_t h, int64_t w) {
  if (h < 0 || h >= in_h || w < 0 || w >= in_w) return nullptr;
  return input + ((n * in_h + h) * in_w + w) * stride;
}

template <class T>
inline void copy(const T* from, int64_t count, T* to) {
  constexpr int64_t L = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T>(to + i, load<T>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

template <class T>
inline void clear(int64_t count, T* to) {
  constexpr int64_t L = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T>(to + i, Vec<T>{});
  for (; i < count; ++i) to[i] = 0;
}

// Where a grid pixel is written.
struct Place {
  int64_t sample, element;
};

// The taps of a kernel without dilation: the row and the column that are read first, and whether
// the kernel's last row or column reads them. No rows: other taps.
struct GridTaps {
  int64_t rows, cols;
  bool turned_h, turned_w;
  int64_t top, left;
};

inline GridTaps grid_taps(const int64_t* tap_h, const int64_t* tap_w, int64_t taps) {
  int64_t cols = 0;
  while (cols < taps && tap_h[cols] == tap_h[0]) ++cols;
  if (cols == 0 || taps % cols) return {};
  const int64_t down = cols < taps ? tap_h[cols] - tap_h[0] : 1;
  const int64_t right = cols > 1 ? tap_w[1] - tap_w[0] : 1;
  bool found = (down == 1 || down == -1) && (right == 1 || right == -1);
  for (int64_t q = 0; q < taps; ++q)
    found &= tap_h[q] == tap_h[0] + q / cols * down && tap_w[q] == tap_w[0] + q % cols * right;
  if (!found) return {};
  return {taps / cols,
          cols,
          down < 0,
          right < 0,
          min(tap_h[0], tap_h[taps - 1]),
          min(tap_w[0], tap_w[taps - 1])};
}

// Pixels [begin, end) in rows of the grid, as use(first pixel, rows, columns): up to `most` whole
// rows of a sample below each other, or what is there of one.
template <class T, class Use>
inline void each_rows(const Direct<T>& a, int64_t begin, int64_t end, int64_t most, Use use) {
  while (begin < end) {
    const GridPixel at(begin, a.rows, a.cols);
    const int64_t left = end - begin;
    const int64_t whole = at.j > 0 ? 0 : min(min(most, a.rows - at.i), left / a.cols);
    const int64_t rows = max<int64_t>(1, whole), cols = min(a.cols - at.j, left);
    use(at, rows, cols);
    begin += rows * cols;
  }
}

// The taps that read inside the image, a bit each; those beyond the last bit share it.
typedef uint64_t TapBits;

inline TapBits taps_inside(const int64_t* taps, int64_t count, int64_t at, int64_t size) {
  TapBits bits = 0;
  for (int64_t q = 0; q < count; ++q)
    if (at + taps[q] >= 0 && at + taps[q] < size) bits |= TapBits(1) << min(q, 63);
  return bits;
}

// Memory of one call: what is read outside the image, a chunk's places, and sums of parts.
template <class T>
struct DirectScratch {
  T *sums, *zeros;
  const T** reads;   // [taps][pixels]
  Place* places;     // [pixels]
  TapBits* columns;  // of a grid's columns, whatever the row
  DirectScratch(const Direct<T>& a, int64_t pixels, char* memory)
      : sums(reinterpret_cast<T*>(memory + bytes(a, pixels, 0))),
        zeros(reinterpret_cast<T*>(memory)),
        reads(reinterpret_cast<const T**>(zeros + zeros_size(a))),
        places(reinterpret_cast<Place*>(reads + a.taps * pixels)),
        columns(reinterpret_cast<TapBits*>(places + pixels)) {
    clear(a.groups * a.depth, zeros);
    for (int64_t j = 0; j < a.cols; ++j)
      columns[j] = taps_inside(a.tap_w, a.taps, j * a.step_w, a.in_w);
  }
  static int64_t zeros_size(const Direct<T>& a) { return skewed<T>(a.groups * a.depth); }
  static int64_t bytes(const Direct<T>& a, int64_t pixels, int64_t sums) {
    const int64_t elements = zeros_size(a) + sums, size = sizeof(T), pointer = sizeof(T*);
    const int64_t all = elements * size + pixels * (a.taps * pointer + int64_t(sizeof(Place))) +
                        a.cols * int64_t(sizeof(TapBits));
    return (all + 63) / 64 * 64;
  }
};

// Pixels next to each other in a row of the grid, the same taps of all of them inside the image.
struct Segment {
  GridPixel first;
  int64_t count;
  TapBits inside;
};

// Cuts pixels [begin, begin + pixels) into segments.
template <class T, class Use>
inline void each_segment(const Direct<T>& a, int64_t begin, int64_t pixels,
                         const DirectScratch<T>& scratch, Use use) {
  for (int64_t s = 0; s < pixels;) {
    GridPixel p(begin + s, a.rows, a.cols);
    const TapBits row = taps_inside(a.tap_h, a.taps, p.i * a.step_h, a.in_h);
    const int64_t end = min(p.j + pixels - s, a.cols);
    while (p.j < end) {
      int64_t j = p.j + 1;
      while (j < end && scratch.columns[j] == scratch.columns[p.j]) ++j;
      use(Segment{p, j - p.j, row & scratch.columns[p.j]});
      s += j - p.j;
      p.j = j;
    }
  }
}

// How many multiples of `step`, from 0 on and at most `most`, lie below `end`.
inline int64_t steps_to(int64_t end, int64_t step, int64_t most) {
  return end <= 0 ? 0 : min(most, (end + step - 1) / step);
}

template <class T>
inline void find_segment(const Direct<T>& a, const Segment& segment, int64_t pixels, int64_t to,
                         const DirectScratch<T>& scratch) {
  const GridPixel& p = segment.first;
  const int64_t count = segment.count;
  for (int64_t q = 0; q < a.taps; ++q) {
    const int64_t h = p.i * a.step_h + a.tap_h[q], w = p.j * a.step_w + a.tap_w[q];
    const T** reads = scratch.reads + q * pixels + to;
    const bool inside = h >= 0 && h < a.in_h;
    const int64_t left = inside ? steps_to(-w, a.step_w, count) : count;
    const int64_t right = inside ? steps_to(a.in_w - w, a.step_w, count) : count;
    const int64_t pixel = (p.n * a.in_h + h) * a.in_w + w;
    for (int64_t k = 0; k < left; ++k) reads[k] = scratch.zeros;
    for (int64_t k = left; k < right; ++k)
      reads[k] = a.input + (pixel + k * a.step_w) * a.in_stride;
    for (int64_t k = right; k < count; ++k) reads[k] = scratch.zeros;
  }
  const int64_t first = (p.n * a.out_h + a.out_origin_h + p.i * a.out_step_h) * a.out_w +
                        a.out_origin_w + p.j * a.out_step_w;
  for (int64_t k = 0; k < count; ++k)
    scratch.places[to + k] = {p.n, (first + k * a.out_step_w) * a.out_stride};
}

// Where pixels [begin, begin + pixels) read and write. Those with the same taps inside the image
// stand together, so that tiles can leave out the others.
template <class T>
inline void find_pixels(const Direct<T>& a, int64_t begin, int64_t pixels,
                        const DirectScratch<T>& scratch) {
  constexpr int64_t kMost = 64;  // kinds of pixels; more share the last
  TapBits kinds[kMost];
  int64_t counts[kMost], known = 0;
  const auto kind_of = [&](TapBits bits) {
    int64_t kind = 0;
    while (kind < known && kinds[kind] != bits) ++kind;
    if (kind == known && known < kMost) kinds[known] = bits, counts[known++] = 0;
    return min(kind, kMost - 1);
  };
  each_segment(a, begin, pixels, scratch,
               [&](const Segment& s) { counts[kind_of(s.inside)] += s.count; });
  int64_t next[kMost];
  for (int64_t kind = 0, at = 0; kind < known; at += counts[kind++]) next[kind] = at;
  each_segment(a, begin, pixels, scratch, [&](const Segment& s) {
    int64_t& to = next[kind_of(s.inside)];
    find_segment(a, s, pixels, to, scratch);
    to += s.count;
  });
}

// What R pixels read under one tap after the other.
template <class T>
struct TapReads {
  const T* const* first;  // of the first tap and pixel
  int64_t pixels;         // from one tap to the next
  const T* zeros;         // what is read outside the image
  const T* const* at(int64_t tap) const { return first + tap * pixels; }
  // Whether all of them read outside the image: an infinite weight is not multiplied by 0 then.
  template <int R>
  bool outside(int64_t tap) const {
    for (int i = 0; i < R; ++i)
      if (at(tap)[i] != zeros) return false;
    return true;
  }
};

// Asks for all that is read and written with `Count` outputs from `element` on.
template <int Count, class T>
inline void prefetch_outputs(const Direct<T>& a, int64_t element) {
  const Epilogue<T>& e = *a.epilogue;
  prefetch<Count>(a.output + element, true);
  if (e.u) prefetch<Count>(e.u + element, true);
  if (e.residual) prefetch<Count>(e.residual + element, false);
}

// Neurons [first, first + used) of R pixels, whose u is given.
// Inlined, so that they never leave their registers.
template <class T, class Places, int R, int V>
[[gnu::always_inline]] inline void write_tile(const Direct<T>& a, const Places& places,
                                              int64_t first, int64_t used, Vec<T> (&u)[R][V]) {
  constexpr int L = VecOf<T>::lanes;
  const Epilogue<T>& e = *a.epilogue;
  if (used < V * L) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
        OutputLane<T>(&e, places[i].sample, first + v * L, min(L, used - v * L))
            .write(a.output, places[i].element + first + v * L, u[i][v]);
    return;
  }
  // Loops over the tile are innermost and unrolled: it stays in registers.
  const auto each = [&](auto change) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) u[i][v] = change(u[i][v], places[i].element + first + v * L);
  };
  if (e.u) each([&](Vec<T> x, int64_t at) { return store<T>(e.u + at, x), x; });
  if (e.mask)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t neuron = first + v * L;
      const Vec<T> scale = load<T>(e.scale + neuron), shift = load<T>(e.shift + neuron);
      const Vec<T> bias = load<T>(e.bias + neuron);
      Affine<T> affine(load<T>(e.mask + neuron), scale, shift, bias);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const T* own = e.mask + places[i].sample * e.mask_stride + neuron;
        if (e.mask_stride) affine = {load<T>(own), scale, shift, bias};
        u[i][v] = affine.gain * u[i][v] + affine.offset;
      }
    }
  if (e.residual) each([&](Vec<T> x, int64_t at) { return x + load<T>(e.residual + at); });
  if (e.active)
    each([&](Vec<T> x, int64_t at) { return store_flags<T>(e.active + at, ~(x <= T(0)), L), x; });
  if (e.relu) each([](Vec<T> x, int64_t) { return relu(x); });
  each([&](Vec<T> x, int64_t at) { return store<T>(a.output + at, x), x; });
}
