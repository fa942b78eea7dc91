// Projected SGD on the masks of many layers.
#include "device.cuh"

namespace mnp::cuda {
namespace {

constexpr int kLayers = 64;  // in a launch, whose arguments have 4 KiB

template <class T>
struct Steps {
  MaskStep layer[kLayers];
  int64_t first[kLayers + 1];  // number of a layer's first block, and of all
  int count;
  T lr, momentum, penalty;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ Steps<T> a) {
  int layer = 0;
  while (a.first[layer + 1] <= blockIdx.x) ++layer;
  const MaskStep& s = a.layer[layer];
  const int64_t i = ((blockIdx.x - a.first[layer]) * kThreads + threadIdx.x) * V;
  if (i >= s.size) return;
  const Span all{0, s.size};
  Vec<T, V> mask = load<T, V>(static_cast<const T*>(s.mask), i, all);
  Vec<T, V> velocity = load<T, V>(static_cast<const T*>(s.velocity), i, all);
  const Vec<T, V> grad = load<T, V>(static_cast<const T*>(s.grad), i, all);
  const Vec<T, V> magnitude = load<T, V>(static_cast<const T*>(s.magnitude), i, all);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    velocity.at[j] = a.momentum * velocity.at[j] + (grad.at[j] + a.penalty * magnitude.at[j]);
    const T next = mask.at[j] - a.lr * velocity.at[j];
    mask.at[j] = next < 0 ? T(0) : next > 1 ? T(1) : next;
  }
  store<T, V>(static_cast<T*>(s.velocity), i, all, velocity);
  store<T, V>(static_cast<T*>(s.mask), i, all, mask);
}

template <class T, int V>
Error run(const MaskStep* layers, int64_t count, double lr, double momentum, double penalty,
          Stream stream) {
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    Steps<T> a{};
    a.lr = static_cast<T>(lr);
    a.momentum = static_cast<T>(momentum);
    a.penalty = static_cast<T>(penalty);
    for (; a.count < kLayers && begin + a.count < count; ++a.count) {
      a.layer[a.count] = layers[begin + a.count];
      a.first[a.count + 1] =
          a.first[a.count] + ceil_div(a.layer[a.count].size, int64_t{kThreads} * V);
    }
    if (Error error = launch(step<T, V>, a.first[a.count], kThreads, stream, a)) return error;
  }
  return nullptr;
}

}  // namespace

Error mask_update(const MaskStep* layers, int64_t count, Element element, double lr,
                  double momentum, double penalty, Stream stream) {
  bool wide = true;
  for (int64_t i = 0; i < count; ++i)
    wide = wide && aligned(layers[i].mask, layers[i].grad, layers[i].velocity, layers[i].magnitude);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    return wide ? run<T, kLanes<T>>(layers, count, lr, momentum, penalty, stream)
                : run<T, 1>(layers, count, lr, momentum, penalty, stream);
  };
  return element == Element::f64 ? go(double{}) : go(float{});
}

}  // namespace mnp::cuda
