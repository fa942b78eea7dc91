// The epilogue of what a convolution, or anything else, has computed: one read, one write.
#include "device.cuh"

namespace mnp::cuda {
namespace {

constexpr int kAhead = 2;  // accesses of a stream in flight in each thread
// Blocks on a multiprocessor, at least. Not told, the compiler spills registers to fit more of
// them.
constexpr int kResident = 2;
constexpr int64_t kBlocks = 2048;  // beyond them, threads take several turns

// z = gain * u + offset + residual.
template <class C>
struct Terms {
  C gain, offset;
};

template <class T>
__device__ Terms<Compute<T>> terms_of(const Epilogue& e, int64_t k, int64_t mask) {
  const Compute<T> m = value<T>(e.mask, mask, 1);
  return {m * value<T>(e.scale, k, 1), m * value<T>(e.shift, k, 0) + value<T>(e.bias, k, 0)};
}

template <class T>
__device__ void apply(const Epilogue& e, const Terms<Compute<T>>& terms, T& element, T residual) {
  Compute<T> z = terms.gain * widen(element) + terms.offset;
  if (e.residual) z += widen(residual);
  narrow(e.relu && z < 0 ? 0 : z, element);
}

__device__ int64_t size_of(const NeuronLayout& l) { return l.batch * l.neurons * l.inner; }

// Runs f(i, u, residual), which turns V elements of u from i on into those of y, over the elements
// first, first + step, ...
template <class T, int V, class F>
__device__ void stream(const Epilogue& e, int64_t first, int64_t step, const F& f) {
  const T* u = static_cast<const T*>(e.u);
  const T* residual = static_cast<const T*>(e.residual);
  T* y = static_cast<T*>(e.y);
  const int64_t size = size_of(e.layout);
  int64_t i = first;
  for (; i + (kAhead - 1) * step + V <= size; i += kAhead * step) {
    Vec<T, V> v[kAhead], r[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      v[a] = load<T, V>(u + i + a * step);
      if (residual) r[a] = load<T, V>(residual + i + a * step);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      f(i + a * step, v[a], r[a]);
      store<T, V>(y + i + a * step, v[a]);
    }
  }
  const Span all{0, size};
  for (; i < size; i += step) {
    Vec<T, V> v = load<T, V>(u, i, all), r{};
    if (residual) r = load<T, V>(residual, i, all);
    f(i, v, r);
    store<T, V>(y, i, all, v);
  }
}

// Channels last. The elements between a thread's turns are a multiple of the neurons, so that its
// neurons stay the same, and their vectors in registers.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    epilogue_channels_last(Epilogue e, int64_t step, Divisor by_neurons, Divisor by_sample) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (first >= step) return;
  const int64_t neurons = e.layout.neurons;
  const int64_t first_neuron = first - divide(first, by_neurons) * neurons;
  const auto neuron = [&](int j) {
    int64_t k = first_neuron + j;
    while (k >= neurons) k -= neurons;
    return k;
  };
  Terms<Compute<T>> terms[V];
#pragma unroll
  for (int j = 0; j < V; ++j) terms[j] = terms_of<T>(e, neuron(j), neuron(j));
  stream<T, V>(e, first, step, [&](int64_t i, Vec<T, V>& v, const Vec<T, V>& residual) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (e.per_sample && i + j < size_of(e.layout))
        terms[j] = terms_of<T>(e, neuron(j), divide(i + j, by_sample) * neurons + neuron(j));
      apply<T>(e, terms[j], v.at[j], residual.at[j]);
    }
  });
}

// Neurons one after the other. A vector may reach from one into the next.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    epilogue_planes(Epilogue e, int64_t step, Divisor by_neurons, Divisor by_inner) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  const int64_t inner = e.layout.inner, rows = e.layout.batch * e.layout.neurons;
  const auto terms_at = [&](int64_t row) {
    const int64_t k = row - divide(row, by_neurons) * e.layout.neurons;
    return terms_of<T>(e, k, e.per_sample ? row : k);
  };
  stream<T, V>(e, first, step, [&](int64_t i, Vec<T, V>& v, const Vec<T, V>& residual) {
    int64_t row = divide(i, by_inner), left = inner - (i - row * inner);
    Terms<Compute<T>> terms = terms_at(row);
#pragma unroll
    for (int j = 0; j < V; ++j, --left) {
      if (left == 0 && row + 1 < rows) {
        terms = terms_at(++row);
        left = inner;
      }
      apply<T>(e, terms, v.at[j], residual.at[j]);
    }
  });
}

template <class T, int V>
Error run(const Epilogue& e, Stream stream) {
  const NeuronLayout& l = e.layout;
  const int64_t size = l.batch * l.neurons * l.inner;
  if (size == 0) return nullptr;
  int64_t blocks = ceil_div(size, int64_t{V} * kThreads * kAhead);
  if (blocks > kBlocks) blocks = kBlocks;
  const Divisor by_neurons(l.neurons);
  if (!l.channels_last)
    return launch(epilogue_planes<T, V>, blocks, kThreads, stream, e, blocks * kThreads * V,
                  by_neurons, Divisor(l.inner));
  int64_t period = l.neurons * V;  // elements after which vectors meet the same neurons
  for (int64_t common = V; common > 1; common /= 2)
    if (l.neurons % common == 0) {
      period = l.neurons * (V / common);
      break;
    }
  const int64_t needed = ceil_div(period, int64_t{V} * kThreads);
  if (blocks < needed) blocks = needed;
  const int64_t step = blocks * kThreads * V / period * period;
  return launch(epilogue_channels_last<T, V>, blocks, kThreads, stream, e, step, by_neurons,
                Divisor(l.neurons * l.inner));
}

}  // namespace

Error epilogue(const Epilogue& e, Stream stream) {
  return with_element(e.element, [&](auto zero) {
    using T = decltype(zero);
    return aligned(e.u, e.residual, e.y) ? run<T, kLanes<T>>(e, stream) : run<T, 1>(e, stream);
  });
}

}  // namespace mnp::cuda
