// The gradient of images of few channels: what each pixel of the convolution's gradient gives to
// all that its taps have read is one product, and is added there. Included once per instruction
// set; see isa.inl.
#pragma once

constexpr int64_t kImagePixels = 4 * kRows;  // whose products are made at a time

// Elements of one row of the padded image.
template <class T>
inline int64_t image_row(const ImageGrad<T>& a) {
  return (a.in_w + 2 * a.padding_w) * a.channels;
}

template <class T>
inline int64_t image_products(const ImageGrad<T>& a) {
  return skewed<T>(Panels<T>{a.taps_h * a.taps_w * a.channels}.padded());
}

template <class T>
int64_t image_grad_scratch(const ImageGrad<T>& a, int64_t rows) {
  // A vector may reach beyond the last run.
  return kImagePixels * image_products(a) + min(rows, a.in_h) * image_row(a) + VecOf<T>::lanes;
}

// to[p * step + i] += from[p * stride + i] for i < length and p < count. Those next to each other
// overlap: far ones follow each other, so that none waits for what the last one has stored.
template <class T>
inline void add_runs(const T* from, int64_t stride, int64_t count, int64_t length, T* to,
                     int64_t step) {
  constexpr int64_t L = VecOf<T>::lanes;
  const int64_t whole = length / L * L, spacing = (whole + L + step - 1) / step;
  Vec<T> lane;
  for (int i = 0; i < L; ++i) lane[i] = T(i);
  const Compared<T> inside = lane < T(length - whole);
  for (int64_t phase = 0; phase < min(spacing, count); ++phase)
    for (int64_t p = phase; p < count; p += spacing) {
      const T* x = from + p * stride;
      T* y = to + p * step;
      for (int64_t v = 0; v < whole; v += L) store<T>(y + v, load<T>(y + v) + load<T>(x + v));
      if (whole == length) continue;
      // Behind the run are other taps' products, and zeros times infinities.
      const Vec<T> rest = inside ? load<T>(x + whole) : Vec<T>{};
      store<T>(y + whole, load<T>(y + whole) + rest);
    }
}

// Rows [begin, end) of batch * in_h.
template <class T>
void image_grad(const ImageGrad<T>& a, int64_t begin, int64_t end, T* scratch) {
  const Panels<T> shape{a.taps_h * a.taps_w * a.channels};
  const int64_t stride = image_products(a), row = image_row(a), run = a.taps_w * a.channels;
  const int64_t step = a.step_w * a.channels, size = a.in_w * a.channels;
  T* const products = scratch;
  T* const image = scratch + kImagePixels * stride;
  for (int64_t first, last; begin < end; begin += last - first) {
    const int64_t n = begin / a.in_h;
    first = begin % a.in_h, last = min(a.in_h, first + end - begin);
    clear((last - first) * row + VecOf<T>::lanes, image);
    const int64_t above = first + a.padding_h - (a.taps_h - 1) * a.dilation_h;
    const int64_t from = above > 0 ? (above + a.step_h - 1) / a.step_h : 0;
    const int64_t stop = min(a.rows, (last - 1 + a.padding_h) / a.step_h + 1);
    for (int64_t i = from; i < stop; ++i)
      for (int64_t j = 0; j < a.cols; j += kImagePixels) {
        const int64_t count = min(kImagePixels, a.cols - j);
        const Rows<T> grads{a.grad + ((n * a.rows + i) * a.cols + j) * a.grad_stride,
                            a.grad_stride};
        for (int64_t p = 0; p < shape.count(); ++p)
          product<T>(count, grads, a.depth, a.panels + p * shape.kWide * a.depth, shape.lanes(p),
                     products + p * shape.kWide, stride);
        for (int64_t q = 0; q < a.taps_h; ++q) {
          const int64_t h = i * a.step_h - a.padding_h + q * a.dilation_h;
          if (h < first || h >= last) continue;
          T* const to = image + (h - first) * row + j * step;
          if (a.dilation_w == 1)
            add_runs(products + q * run, stride, count, run, to, step);
          else
            for (int64_t w = 0; w < a.taps_w; ++w)
              add_runs(products + q * run + w * a.channels, stride, count, a.channels,
                       to + w * a.dilation_w * a.channels, step);
        }
      }
    for (int64_t h = first; h < last; ++h) {
      const T* x = image + (h - first) * row + a.padding_w * a.channels;
      const int64_t at = (n * a.in_h + h) * size;
      if (a.add)
        for (int64_t k = 0; k < size; ++k) a.output[at + k] = x[k] + a.add[at + k];
      else
        copy(x, size, a.output + at);
    }
  }
}
