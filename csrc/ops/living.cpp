#include "living.h"

#include <algorithm>

#include "image.h"

namespace mnp::ops {
namespace {

constexpr int64_t kVector = 8;  // neurons that cost as much as one of them alone

template <class T>
std::vector<char> are_living(const Mask& mask, const Conv& conv) {
  const T* const values = data<T>(mask.values);
  std::vector<char> living(conv.k);
  for (int64_t n = 0; n < (mask.stride ? conv.n : 1); ++n)
    for (int64_t k = 0; k < conv.k; ++k) living[k] |= values[n * conv.k + k] != 0;
  return living;
}

// Whether leaving out neurons saves more than the others cost: their outputs and weights are moved.
// In multiplications, as measured with one thread on AVX2; Winograd's have 2 an output and channel.
bool pays(const Conv& conv, int64_t living, Algorithm algorithm) {
  const bool direct = algorithm != Algorithm::winograd2 && algorithm != Algorithm::winograd4;
  const int64_t pixels = conv.n * conv.oh * conv.ow, weights = conv.c * conv.taps();
  const int64_t products = pixels * conv.c * (direct ? conv.taps() : 2);
  const int64_t saved = products + weights * (direct ? 10 : 40);  // weights are packed
  const int64_t spent = 60 * pixels + 20 * weights;
  return (conv.k - living) * saved > living * spent;
}

}  // namespace

Living::Living(const Conv& given, const Mask& mask, Algorithm algorithm)
    : whole(given), conv(given) {
  if (whole.groups > 1) return;
  std::vector<char> living;
  with_type(mask.values.scalar_type(),
            [&](auto zero) { living = are_living<decltype(zero)>(mask, whole); });
  int64_t count = std::count(living.begin(), living.end(), 1);
  for (int64_t k = 0; k < whole.k && count % kVector; ++k)  // the last vector, filled up
    if (!living[k]) living[k] = 1, ++count;
  if (!pays(whole, count, algorithm)) return;
  conv.k = count;
  for (int64_t k = 0; k < whole.k; ++k)
    if (living[k]) neurons.push_back(k);
}

Tensor Living::filters(const Tensor& weight) const {
  if (all()) return weight;
  const int64_t size = conv.c * conv.taps();
  Tensor part = empty_image({conv.k, size, 1, 1}, weight.scalar_type());
  with_type(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Weights<T> w = weights_of<T>(weight, false);
    T* const target = mutable_data<T>(part);
    torch::stable::parallel_for(0, conv.k, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = w.data + neurons[i] * w.stride_j;
        T* to = target + i * size;
        for (int64_t c = 0; c < conv.c; ++c)
          for (int64_t q = 0; q < conv.taps(); ++q) *to++ = from[c * w.stride_d + q * w.stride_q];
      }
    });
  });
  return torch::stable::reshape(part, {conv.k, conv.c, conv.kh, conv.kw});
}

template <class T>
void Living::expand(const T* u, const cpu::Epilogue<T>& epilogue, T* y) const {
  const auto& kernels = cpu::kernels_of<T>();
  const int64_t inner = conv.oh * conv.ow;
  const cpu::ExpandNeurons<T> a{
      {conv.n, whole.k, inner, true}, neurons.data(), conv.k, u, &epilogue, y};
  torch::stable::parallel_for(0, conv.n * inner, grain(whole.k), [&](int64_t begin, int64_t end) {
    const auto scratch = buffer<T>(kernels.expand_scratch(whole.k));
    kernels.expand_neurons(a, begin, end, scratch.get());
  });
}

template <class T>
void Living::compact(T* g, int64_t g_stride) const {
  if (all()) return;
  const int64_t pixels = conv.n * conv.oh * conv.ow;
  torch::stable::parallel_for(0, pixels, grain(conv.k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t i = 0; i < conv.k; ++i) g[p * g_stride + i] = g[p * g_stride + neurons[i]];
  });
}

template <class T>
void Living::expand_filters(T* dw) const {
  if (all()) return;
  const int64_t size = conv.c * conv.taps();
  int64_t end = whole.k;  // of what is not in place; filters move to the back, the last one first
  for (int64_t i = conv.k; i-- > 0; end = neurons[i]) {
    std::fill(dw + (neurons[i] + 1) * size, dw + end * size, T(0));
    if (neurons[i] != i) std::copy_n(dw + i * size, size, dw + neurons[i] * size);
  }
  std::fill(dw, dw + end * size, T(0));
}

template void Living::expand(const float*, const cpu::Epilogue<float>&, float*) const;
template void Living::compact(float*, int64_t) const;
template void Living::expand_filters(float*) const;
template void Living::expand(const double*, const cpu::Epilogue<double>&, double*) const;
template void Living::compact(double*, int64_t) const;
template void Living::expand_filters(double*) const;

}  // namespace mnp::ops
