// Depthwise convolution: every channel by itself. Included once per instruction set; see isa.inl.
#pragma once

// V vectors of channels of one pixel, of which `used` exist.
template <class T, int V, bool Whole>
inline void depthwise_strip(const GatherGemm<T>& a, const GridPixel& p, int64_t pixel,
                            int64_t first, int64_t used) {
  constexpr int64_t L = VecOf<T>::lanes;
  const auto read = [&](const T* from, int v) {
    return Whole ? load<T>(from + v * L) : load_some<T>(from + v * L, used - v * L);
  };
  Vec<T> u[V] = {};
  for (int64_t q = 0; q < a.taps; ++q) {
    const T* x = under_tap(a.input, a.in_h, a.in_w, a.in_stride, p.n, p.i * a.step_h + a.tap_h[q],
                           p.j * a.step_w + a.tap_w[q]);
    const T* w = a.panels + q * a.groups + first;
    // Padding is multiplied too: 0 times infinity is NaN, as in other convolutions.
    for (int v = 0; v < V; ++v) u[v] += (x ? read(x + first, v) : Vec<T>{}) * read(w, v);
  }
  for (int v = 0; v < V; ++v)
    OutputLane<T>(a.epilogue, p.n, first + v * L, min(L, used - v * L))
        .write(a.output, pixel * a.groups + first + v * L, u[v]);
}

template <class T>
void depthwise(const GatherGemm<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t g = begin; g < end; ++g) {
    const GridPixel p(g, a.rows, a.cols);
    const int64_t pixel = out_pixel(a, p);
    int64_t c = 0;
    for (; c + 8 * L <= a.groups; c += 8 * L) depthwise_strip<T, 8, true>(a, p, pixel, c, 8 * L);
    for (; c + 2 * L <= a.groups; c += 2 * L) depthwise_strip<T, 2, true>(a, p, pixel, c, 2 * L);
    for (; c < a.groups; c += L) depthwise_strip<T, 1, false>(a, p, pixel, c, min(L, a.groups - c));
  }
}

template <class T>
void depthwise_weight_grad(const WeightGrad<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t c = begin; c < end; c += L) {
    const int64_t used = min(L, end - c);
    for (int64_t q = 0; q < a.taps; ++q) {
      Vec<T> total{};
      for (int64_t row = 0; row < a.batch * a.rows; ++row) {
        Vec<T> sum{};
        for (int64_t j = 0; j < a.cols; ++j) {
          const T* x = under_tap(a.input, a.in_h, a.in_w, a.in_channels, row / a.rows,
                                 row % a.rows * a.step_h + a.tap_h[q], j * a.step_w + a.tap_w[q]);
          const Vec<T> in = x ? load_some<T>(x + c, used) : Vec<T>{};
          sum += in * load_some<T>(a.grad + (row * a.cols + j) * a.grad_stride + c, used);
        }
        total += sum;
      }
      for (int64_t j = 0; j < used; ++j) a.weight_grad[(c + j) * a.taps + q] = total[j];
    }
  }
}
