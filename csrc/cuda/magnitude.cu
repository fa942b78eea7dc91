// Norms of the neurons of many layers: a warp has one neuron.
#include "device.cuh"

namespace mnp::cuda {
namespace {

constexpr int kLayers = 64;  // in a launch, whose arguments have 4 KiB

struct Layers {
  NeuronRows layer[kLayers];
  int64_t first[kLayers + 1];  // number of a layer's first neuron, and of all
  int count;
};

// The layer that has neuron number `row`.
__device__ int layer_of(const Layers& a, int64_t row) {
  int layer = 0;
  for (int step = kLayers / 2; step; step /= 2)
    if (layer + step < a.count && a.first[layer + step] <= row) layer += step;
  return layer;
}

template <Norm norm, class C>
__device__ C joined(C a, C b) {
  if constexpr (norm == Norm::linf) return a > b || a != a ? a : b;  // NaN stays
  return a + b;
}

template <class T, Norm norm>
__global__ void __launch_bounds__(kThreads) norms(const __grid_constant__ Layers a) {
  using C = Compute<T>;
  constexpr int V = kLanes<T>;
  const int64_t number = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (number >= a.first[a.count]) return;
  const int layer = layer_of(a, number);
  const NeuronRows& rows = a.layer[layer];
  const int64_t neuron = number - a.first[layer];
  const T* row = static_cast<const T*>(rows.weights) + neuron * rows.stride;
  // From the last border of 16 bytes in front of the row.
  const int64_t ahead = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
  const Span span{ahead, ahead + rows.size};
  C part[V] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp * V; i < span.end; i += kWarp * V) {
    const Vec<T, V> v = load<T, V>(row - ahead, i, span);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const C w = widen(v.at[j]);
      part[j] = joined<norm>(part[j], norm == Norm::l2 ? w * w : w < 0 ? -w : w);
    }
  }
  C total = part[0];
#pragma unroll
  for (int j = 1; j < V; ++j) total = joined<norm>(total, part[j]);
  for (int step = 1; step < kWarp; step *= 2)
    total = joined<norm>(total, __shfl_xor_sync(0xffffffffu, total, step));
  if (threadIdx.x % kWarp == 0)
    static_cast<C*>(rows.norms)[neuron] = norm == Norm::l2 ? sqrt(total) : total;
}

template <class T>
Error run(const Layers& a, Norm norm, Stream stream) {
  const int64_t blocks = ceil_div(a.first[a.count], kThreads / kWarp);
  if (norm == Norm::l1) return launch(norms<T, Norm::l1>, blocks, kThreads, stream, a);
  if (norm == Norm::l2) return launch(norms<T, Norm::l2>, blocks, kThreads, stream, a);
  return launch(norms<T, Norm::linf>, blocks, kThreads, stream, a);
}

}  // namespace

Error magnitude(const NeuronRows* layers, int64_t count, Element element, Norm norm,
                Stream stream) {
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    Layers a{};
    for (; a.count < kLayers && begin + a.count < count; ++a.count) {
      a.layer[a.count] = layers[begin + a.count];
      a.first[a.count + 1] = a.first[a.count] + a.layer[a.count].neurons;
    }
    const Error error =
        with_element(element, [&](auto zero) { return run<decltype(zero)>(a, norm, stream); });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace mnp::cuda
