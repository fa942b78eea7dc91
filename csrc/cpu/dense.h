// Convolution as a matrix product whose rows are read in place. Included once per instruction set;
// see isa.inl.
#pragma once

// Each row has a pointer of its own: more rows than these have no registers for them.
constexpr int kPointerRows = kRows < 8 ? kRows : 8;

// Panels [begin, end) of one group, whose neighbouring outputs' weights lie next to each other: all
// of a channel before the next one's, which may be on another page and is asked for ahead.
template <class T>
inline void pack_neighbours(const PackPanels<T>& a, int64_t begin, int64_t end, T* panels) {
  constexpr int64_t L = VecOf<T>::lanes, W = Panels<T>::kWide;
  const Panels<T> shape{a.width};
  const Weights<T> w = a.weights;
  const int64_t whole = min(end, a.width / W), size = W * a.taps * a.depth;
  const int64_t ahead = 8 * w.stride_d;
  for (int64_t q = 0; q < w.taps; ++q) {
    if (a.place[q] < 0) continue;
    for (int64_t d = 0; d < a.depth; ++d) {
      const T* from = w.data + begin * W + q * w.stride_q + d * w.stride_d;
      const int64_t row = a.place[q] * a.depth + d;
      T* to = panels + begin * size + row * W;
      for (int64_t p = begin; p < whole; ++p, from += W, to += size) {
        __builtin_prefetch(from + ahead);
        store<T>(to, load<T>(from));
        store<T>(to + L, load<T>(from + L));
      }
      if (whole == end) continue;
      const int64_t lanes = shape.lanes(whole), used = shape.used(whole);
      to = panels + whole * size + row * lanes;
      for (int64_t v = 0; v < lanes; v += L)
        store<T>(to + v, load_some<T>(from + v, min(L, used - v)));
    }
  }
}

// Panels [begin, end) of all groups.
template <class T>
void pack_dense(const PackPanels<T>& a, int64_t begin, int64_t end, T* panels) {
  constexpr int64_t L = VecOf<T>::lanes;
  if (a.groups == 1 && a.weights.stride_j == 1) return pack_neighbours(a, begin, end, panels);
  const Panels<T> shape{a.width};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / shape.count(), p = i % shape.count(), lanes = shape.lanes(p);
    for (int64_t v = 0; v < lanes; v += L) {
      T* panel = panels + (group * shape.padded() + p * shape.kWide) * a.taps * a.depth + v;
      Weights<T> weights = a.weights;
      weights.data += group * a.stride_g + (p * shape.kWide + v) * weights.stride_j;
      read_weights<T>(weights, min(L, shape.used(p) - v), a.depth,
                      [&](int64_t q, int64_t d, Vec<T> w) {
                        if (a.place[q] >= 0)
                          store<T>(panel + (a.place[q] * a.depth + d) * lanes, w);
                      });
    }
  }
}

// How a product over taps * depth elements is cut so that a panel's part stays in the first cache,
// and how many pixels' inputs and outputs stay in the second; of these, all panels pass over a
// block before the next one.
template <class T>
struct DenseBlocks {
  int64_t taps, depth, parts, pixels, block;
  explicit DenseBlocks(const Direct<T>& a) {
    const int64_t size = sizeof(T), most = max<int64_t>(64, a.l1 / (Panels<T>::kWide * size));
    const auto even = [](int64_t total, int64_t limit) {
      const int64_t count = max<int64_t>(1, (total + limit - 1) / limit);
      return (total + count - 1) / count;
    };
    // One part where there is nothing to sum over: no tap or no channel.
    depth = max<int64_t>(1, even(a.depth, most));
    taps = max<int64_t>(1, even(a.taps, max<int64_t>(1, most / depth)));
    parts = max<int64_t>(1, (a.taps + taps - 1) / taps) *
            max<int64_t>(1, (a.depth + depth - 1) / depth);
    const int64_t read = min(a.taps, a.step_h * a.step_w) * depth + Panels<T>{a.width}.padded();
    const int64_t rows = a.l2 / 2 / (read * size + a.taps * int64_t(sizeof(T*))) / kPointerRows;
    pixels = kPointerRows * min(64, max<int64_t>(4, rows));
    const int64_t panels = Panels<T>{a.width}.padded() * taps * depth * size;
    block = panels <= a.l1 / 2 ? kPointerRows : pixels;
  }
};

// The part of a product that a tile computes.
template <class T>
struct DensePart {
  TapReads<T> reads;
  int64_t taps, offset, depth;
  const T* panel;
  int64_t next_panel;  // of the next group
  T* sums;             // of the first pixel
  int64_t sums_stride;
  bool is_first, is_last;
};

// R pixels times a panel of V vectors, or of V groups one vector each.
template <class T, int R, int V, bool Groups>
[[gnu::noinline]] void dense_tile(const Direct<T>& a, const DensePart<T>& part, const Place* places,
                                  int64_t first, int64_t used) {
  constexpr int L = VecOf<T>::lanes;
  // Unrolled before anything else, these loops over the tile leave it in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // What the next tile writes and reads, if it lies behind this one.
  if (part.is_last)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      prefetch_outputs<V * L>(a, places[i].element + R * a.out_step_w * a.out_stride + first);
  const int64_t ahead = a.step_w == 1 ? R * a.in_stride : 0;
  constexpr int64_t step = Groups ? L : V * L;
  const int64_t next_panel = Groups ? part.next_panel : L, next_read = Groups ? a.depth : 0;
  const T* panel = part.panel;
  for (int64_t q = 0; q < part.taps; ++q) {
    if (part.reads.template outside<R>(q)) {
      panel += part.depth * step;
      continue;
    }
    const T* rows[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) rows[i] = part.reads.at(q)[i] + part.offset;
#pragma GCC unroll 4
    for (int64_t d = 0; d < part.depth; ++d) {
      Vec<T> b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * next_panel);
      __builtin_prefetch(rows[0] + ahead + d * R);
      panel += step;
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] += b[v] * rows[i][d + v * next_read];
    }
  }
  // Sums of parts have smaller rounding errors than one long sum.
  T* const sums = part.sums;
  const int64_t stride = part.sums_stride;
  if (!part.is_first)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += load<T>(sums + i * stride + v * L);
  if (part.is_last) return write_tile(a, places, first, used, acc);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<T>(sums + i * stride + v * L, acc[i][v]);
}

template <class T, int V, bool Groups, int R = kPointerRows>
inline void dense_rows(int64_t count, const Direct<T>& a, const DensePart<T>& part,
                       const Place* places, int64_t first, int64_t used) {
  if constexpr (R > 0) {
    if (count == R)
      dense_tile<T, R, V, Groups>(a, part, places, first, used);
    else
      dense_rows<T, V, Groups, R - 1>(count, a, part, places, first, used);
  }
}

template <class T>
int64_t dense_scratch(const Direct<T>& a) {
  const DenseBlocks<T> cut(a);
  const int64_t sums = cut.parts > 1 ? skewed<T>(Panels<T>{a.width}.padded()) : 0;
  return DirectScratch<T>::bytes(a, cut.pixels, cut.pixels * sums);
}

template <class T>
void dense(const Direct<T>& a, int64_t begin, int64_t end, char* memory) {
  constexpr int64_t W = Panels<T>::kWide;
  const Panels<T> shape{a.width};
  const DenseBlocks<T> cut(a);
  const int64_t total = a.panel_depth, sums_stride = skewed<T>(shape.padded());
  const DirectScratch<T> scratch(a, cut.pixels, memory);
  for (int64_t chunk = begin; chunk < end; chunk += cut.pixels) {
    const int64_t pixels = min(cut.pixels, end - chunk);
    find_pixels(a, chunk, pixels, scratch);
    for (int64_t group = 0, next; group < a.groups; group = next) {
      // Groups of one vector go in pairs: alone they have too few sums to hide the latency.
      const bool pair = a.width == VecOf<T>::lanes && cut.parts == 1 && group + 1 < a.groups;
      next = group + 1 + pair;
      const T* panels = a.panels + group * shape.padded() * total;
      for (int64_t index = 0, q = 0, d = 0; index < cut.parts; ++index) {
        DensePart<T> part{};
        part.reads = {scratch.reads + q * pixels, pixels, scratch.zeros};
        const T* const* const reads = part.reads.first;
        part.taps = min(cut.taps, a.taps - q), part.depth = min(cut.depth, a.depth - d);
        part.offset = group * a.depth + d;
        part.next_panel = shape.padded() * total;
        part.sums_stride = sums_stride;
        part.is_first = index == 0, part.is_last = index + 1 == cut.parts;
        for (int64_t begin = 0; begin < pixels; begin += cut.block) {
          const int64_t count = min(cut.block, pixels - begin),
                        tiles = (count + kPointerRows - 1) / kPointerRows;
          for (int64_t p = 0; p < shape.count(); ++p) {
            const int64_t lanes = shape.lanes(p), used = pair ? W : shape.used(p);
            const int64_t first = group * a.width + p * W;
            const int64_t at = a.panel_first + q * a.depth + d;
            part.panel = panels + p * W * total + at * lanes;
            // Tiles of nearly equal height: a short last one could not hide the latency.
            for (int64_t t = 0, s = begin; t < tiles; ++t) {
              const int64_t stop = begin + (t + 1) * count / tiles;
              part.reads.first = reads + s;
              part.sums = scratch.sums + s * sums_stride + p * W;
              const Place* places = scratch.places + s;
              if (pair)
                dense_rows<T, 2, true>(stop - s, a, part, places, first, used);
              else if (lanes == W)
                dense_rows<T, 2, false>(stop - s, a, part, places, first, used);
              else
                dense_rows<T, 1, false>(stop - s, a, part, places, first, used);
              s = stop;
            }
          }
        }
        d += cut.depth;
        if (d >= a.depth) q += cut.taps, d = 0;
      }
    }
  }
}
