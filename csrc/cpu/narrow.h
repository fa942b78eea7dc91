// Convolution in groups so narrow that a vector holds whole ones; depthwise are those of one
// channel. Included once per instruction set; see isa.inl.
#pragma once

// Whether a vector holds several groups of as many channels in as out.
template <class T>
inline bool is_narrow(int64_t groups, int64_t depth, int64_t width) {
  return groups > 1 && depth == width && width < VecOf<T>::lanes && VecOf<T>::lanes % width == 0;
}

// Vectors [begin, end) of the channels of all groups: [tap][depth][lanes] each.
template <class T>
void pack_narrow(const PackPanels<T>& a, int64_t begin, int64_t end, T* panels) {
  constexpr int64_t L = VecOf<T>::lanes;
  const Weights<T> w = a.weights;
  for (int64_t i = begin; i < end; ++i) {
    const T* lanes[L];  // each one's weights
    const int64_t used = min(L, a.groups * a.width - i * L);
    for (int64_t j = 0; j < used; ++j)
      lanes[j] = w.data + (i * L + j) / a.width * a.stride_g + j % a.width * w.stride_j;
    for (int64_t q = 0; q < w.taps; ++q)
      for (int64_t d = 0; d < a.depth && a.place[q] >= 0; ++d) {
        T* to = panels + ((i * a.taps + a.place[q]) * a.depth + d) * L;
        for (int64_t j = 0; j < used; ++j) to[j] = lanes[j][q * w.stride_q + d * w.stride_d];
        for (int64_t j = used; j < L; ++j) to[j] = 0;
      }
  }
}

// Channel d of each lane's own group, of W channels.
template <class T, int W>
inline Vec<T> spread(Vec<T> x, int d) {
  if constexpr (W == 1) return x;
  Vec<T> out;
  for (int j = 0; j < VecOf<T>::lanes; ++j) out[j] = x[j / W * W + d];
  return out;
}

// V vectors of channels of R pixels; of the last one `used` channels exist.
template <class T, int W, int R, int V, bool Whole>
[[gnu::noinline]] void narrow_tile(const Direct<T>& a, const TapReads<T>& reads,
                                   const Place* places, int64_t first, int64_t used) {
  constexpr int L = VecOf<T>::lanes;
  // Unrolled before anything else, this loop leaves them in registers.
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  // What the next tile writes, and what it is first to read, if it lies behind this one.
  const int64_t written = R * a.out_step_w * a.groups * W, read = R * a.step_w * a.in_stride;
  for (int i = 0; i < R; ++i) {
    prefetch_outputs<V * L>(a, places[i].element + written + first);
    if (a.taps > 0) prefetch<V * L>(reads.at(a.taps - 1)[i] + read + first, false);
  }
  const T* panel = a.panels + first * a.panel_depth + a.panel_first * L;
  const int64_t next = a.panel_depth * L;
  for (int64_t q = 0; q < a.taps; ++q, panel += W * L) {
    if (reads.template outside<R>(q)) continue;
    const T* const* rows = reads.at(q);
#pragma GCC unroll 16
    for (int d = 0; d < W; ++d) {
      Vec<T> b[V];
      for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * next + d * L);
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) {
          const T* x = rows[i] + first + v * L;
          acc[i][v] += spread<T, W>(Whole ? load<T>(x) : load_some<T>(x, used), d) * b[v];
        }
    }
  }
  write_tile(a, places, first, (V - 1) * L + used, acc);
}

// All channels of R pixels.
template <class T, int W, int R>
inline void narrow_pixel_tile(const Direct<T>& a, const TapReads<T>& reads, const Place* places) {
  constexpr int64_t L = VecOf<T>::lanes;
  const int64_t channels = a.groups * W;
  int64_t c = 0;
  if constexpr (W == 1 && R <= 4)
    for (; c + 4 * L <= channels; c += 4 * L) narrow_tile<T, W, R, 4, true>(a, reads, places, c, L);
  for (; c + 2 * L <= channels; c += 2 * L) narrow_tile<T, W, R, 2, true>(a, reads, places, c, L);
  for (; c < channels; c += L)
    narrow_tile<T, W, R, 1, false>(a, reads, places, c, min(L, channels - c));
}

template <class T>
inline int64_t narrow_pixels(const Direct<T>& a) {
  const int64_t bytes = a.groups * a.width * (1 + a.step_h * a.step_w) * int64_t(sizeof(T));
  return kPointerRows * min(64, max<int64_t>(4, a.l2 / 2 / bytes / kPointerRows));
}

template <class T>
int64_t narrow_scratch(const Direct<T>& a) {
  return DirectScratch<T>::bytes(a, narrow_pixels(a), 0);
}

template <class T, int W = 1>
void narrow(const Direct<T>& a, int64_t begin, int64_t end, char* memory) {
  constexpr int64_t L = VecOf<T>::lanes;
  if constexpr (2 * W < L)
    if (a.width != W) return narrow<T, 2 * W>(a, begin, end, memory);
  if constexpr (W == 1)
    if (depthwise(a, begin, end)) return;
  const int64_t most = narrow_pixels(a);
  const DirectScratch<T> scratch(a, most, memory);
  for (int64_t chunk = begin; chunk < end; chunk += most) {
    const int64_t pixels = min(most, end - chunk);
    find_pixels(a, chunk, pixels, scratch);
    int64_t s = 0;
    TapReads<T> reads{scratch.reads, pixels, scratch.zeros};
    constexpr int R = W == 1 ? 4 : kPointerRows;
    for (; s + R <= pixels; s += R, reads.first += R)
      narrow_pixel_tile<T, W, R>(a, reads, scratch.places + s);
    for (; s < pixels; ++s, ++reads.first) narrow_pixel_tile<T, W, 1>(a, reads, scratch.places + s);
  }
}
