// The gradient of a convolution's weights. Included once per instruction set; see isa.inl.
#pragma once

// A unit is one panel of input channels of one group under one tap.
template <class T>
int64_t weight_grad_units(const WeightGrad<T>& a) {
  return a.groups * Panels<T>{a.depth}.count() * a.taps;
}

// Pixels that are multiplied at a time: their gradients stay in the second cache.
template <class T>
inline int64_t grad_pixels(const WeightGrad<T>& a) {
  const int64_t rows = a.l2 / 2 / (a.grad_stride * static_cast<int64_t>(sizeof(T)));
  return min(256, max<int64_t>(64, rows));
}

template <class T>
int64_t weight_grad_scratch(const WeightGrad<T>& a, int64_t units) {
  return (grad_pixels(a) + units * a.width) * Panels<T>::kWide;
}

// Which panel, tap and group a unit is; taps innermost, because they share input pixels.
template <class T>
struct GradUnit {
  int64_t tap, panel, group;
  GradUnit(const WeightGrad<T>& a, int64_t unit)
      : tap(unit % a.taps),
        panel(unit / a.taps % Panels<T>{a.depth}.count()),
        group(unit / a.taps / Panels<T>{a.depth}.count()) {}
};

// The input under a unit's tap as [pixel][lanes], zero where there is none.
template <class T>
inline void gather_panel(const WeightGrad<T>& a, const GradUnit<T>& unit, int64_t chunk,
                         int64_t pixels, int64_t lanes, int64_t used, T* panel) {
  const T* input = a.input + unit.group * a.depth + unit.panel * Panels<T>::kWide;
  for (int64_t s = 0; s < pixels; ++s, panel += lanes) {
    const GridPixel p(chunk + s, a.rows, a.cols);
    const T* x = under_tap(input, a.in_h, a.in_w, a.in_channels, p.n,
                           p.i * a.step_h + a.tap_h[unit.tap], p.j * a.step_w + a.tap_w[unit.tap]);
    const int64_t count = x ? used : 0;
    if (x) copy(x, count, panel);
    clear(lanes - count, panel + count);
  }
}

template <class T>
void weight_grad(const WeightGrad<T>& a, int64_t begin, int64_t end, T* scratch) {
  const Panels<T> shape{a.depth};
  const int64_t most = grad_pixels(a), all_pixels = a.batch * a.rows * a.cols;
  const int64_t unit_size = a.width * shape.kWide;
  T* sums = scratch + most * shape.kWide;
  clear((end - begin) * unit_size, sums);
  for (int64_t chunk = 0; chunk < all_pixels; chunk += most)
    for (int64_t u = begin; u < end; ++u) {
      const GradUnit<T> unit(a, u);
      const int64_t pixels = min(most, all_pixels - chunk), lanes = shape.lanes(unit.panel);
      gather_panel(a, unit, chunk, pixels, lanes, shape.used(unit.panel), scratch);
      const Rows<T> grads{a.grad + chunk * a.grad_stride + unit.group * a.width, a.grad_stride};
      product<T, true>(a.width, grads, pixels, scratch, lanes, sums + (u - begin) * unit_size,
                       lanes, true);
    }
  for (int64_t u = begin; u < end; ++u) {
    const GradUnit<T> unit(a, u);
    const int64_t lanes = shape.lanes(unit.panel);
    const T* sum = sums + (u - begin) * unit_size;
    for (int64_t k = 0; k < a.width; ++k)
      for (int64_t j = 0; j < shape.used(unit.panel); ++j)
        a.weight_grad[((unit.group * a.width + k) * a.depth + unit.panel * shape.kWide + j) *
                          a.taps +
                      unit.tap] = sum[k * lanes + j];
  }
}

// Of groups [begin, end) with one channel in and out.
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
