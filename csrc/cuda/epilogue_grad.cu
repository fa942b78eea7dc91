// The epilogue's gradients: dz, the gradient of u, and all sums over a sample in one pass.
//
// Every sum is added in an order that the shape alone decides, so results have the same bits each
// time; nothing is added atomically.
#include "device.cuh"

namespace mnp::cuda {
namespace {

constexpr int kSums = 3;
constexpr int64_t kFill = 1024;  // blocks that keep a large device busy
constexpr int64_t kPixels = 4;   // pixels a thread should have before another block shares its work

template <class T>
struct Neuron {
  Compute<T> gain, scale, shift;
};

template <class T>
__device__ Neuron<T> neuron_at(const EpilogueGrad& e, int64_t k, int64_t n) {
  const int64_t mask = e.per_sample ? n * e.layout.neurons + k : k;
  const Compute<T> scale = value<T>(e.scale, k, 1);
  return {value<T>(e.mask, mask, 1) * scale, scale, value<T>(e.shift, k, 0)};
}

// The elements [i, i + V) inside the range; each is multiplied with its neuron's gain and added to
// its sums.
template <class T, int V, class Range, class N, class S>
__device__ void grad_of(const EpilogueGrad& e, int64_t i, const Range& range, const N& neuron,
                        const S& sum) {
  using C = Compute<T>;
  // All reads come first, so that they are under way together.
  Vec<T, V> dy = load<T, V>(static_cast<const T*>(e.grad), i, range), y{}, u{};
  if (e.y) y = load<T, V>(static_cast<const T*>(e.y), i, range);
  if (e.sums) u = load<T, V>(static_cast<const T*>(e.u), i, range);
  if (e.y) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (widen(y.at[j]) <= 0) narrow(0, dy.at[j]);
  }
  if (e.dz) store<T, V>(static_cast<T*>(e.dz), i, range, dy);
  if (e.sums) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (!range.has(i + j)) continue;
      const C d = widen(dy.at[j]), v = widen(u.at[j]);
      sum(j, 0, d);
      sum(j, 1, d * (neuron(j).scale * v + neuron(j).shift));
      sum(j, 2, d * v);
    }
  }
  if (e.g) {
#pragma unroll
    for (int j = 0; j < V; ++j) narrow(widen(dy.at[j]) * neuron(j).gain, dy.at[j]);
    store<T, V>(static_cast<T*>(e.g), i, range, dy);
  }
}

// Neurons one after the other: `lanes` threads, a power of two, share those of a sample's neuron.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) grad_planes(EpilogueGrad e, int lanes) {
  using C = Compute<T>;
  const int64_t rows = e.layout.batch * e.layout.neurons, inner = e.layout.inner;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  C total[kSums] = {};
  if (row < rows) {
    const uint32_t neurons = static_cast<uint32_t>(e.layout.neurons);
    const uint32_t n = static_cast<uint32_t>(row) / neurons;
    const Neuron<T> neuron = neuron_at<T>(e, static_cast<uint32_t>(row) % neurons, n);
    const Span span{row * inner, (row + 1) * inner};
    C part[V][kSums] = {};  // an element's sums of its own keep rounding errors small
    for (int64_t i = span.begin / V * V + lane * V; i < span.end; i += int64_t{lanes} * V)
      grad_of<T, V>(
          e, i, span, [&](int) { return neuron; }, [&](int j, int s, C v) { part[j][s] += v; });
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int j = 0; j < V; ++j) total[s] += part[j][s];
  }
  if (!e.sums) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) total[s] = sum_lanes(total[s], lanes < kWarp ? lanes : kWarp);
  if (lanes > kWarp) {
    __shared__ C of_warp[kSums][kThreads / kWarp];
    if (threadIdx.x % kWarp == 0)
      for (int s = 0; s < kSums; ++s) of_warp[s][threadIdx.x / kWarp] = total[s];
    __syncthreads();
    for (int s = 0; s < kSums; ++s) {
      total[s] = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) total[s] += of_warp[s][w];
    }
  }
  if (lane == 0 && row < rows)
    for (int s = 0; s < kSums; ++s) static_cast<C*>(e.sums)[s * rows + row] = total[s];
}

// How blocks share a channels-last image: each has `rows` pixels of `lanes` vectors at a time, of
// one sample, one tile of channels, and one of `splits` parts of the pixels.
struct Tiles {
  int lanes, rows;
  unsigned tiles, splits;
  int64_t pixels;  // in a part
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    grad_channels_last(EpilogueGrad e, Tiles t, Compute<T>* sums) {
  using C = Compute<T>;
  const int64_t neurons = e.layout.neurons, inner = e.layout.inner, batch = e.layout.batch;
  const unsigned tile = blockIdx.x % t.tiles, rest = blockIdx.x / t.tiles;
  const int64_t split = rest % t.splits, n = rest / t.splits;
  const int lane = threadIdx.x % t.lanes, row = threadIdx.x / t.lanes;
  const int64_t k = (int64_t{tile} * t.lanes + lane) * V;
  const bool inside = k < neurons;
  C total[V][kSums] = {};
  if (inside) {
    Neuron<T> neuron[V];
#pragma unroll
    for (int j = 0; j < V; ++j) neuron[j] = neuron_at<T>(e, k + j, n);
    const int64_t begin = split * t.pixels;
    const int64_t end = begin + t.pixels < inner ? begin + t.pixels : inner;
    for (int64_t p = begin + row; p < end; p += t.rows)
      grad_of<T, V>(
          e, (n * inner + p) * neurons + k, Inside{}, [&](int j) { return neuron[j]; },
          [&](int j, int s, C v) { total[j][s] += v; });
  }
  if (!sums) return;
  __shared__ C shared[kSums * V * kThreads];
  const auto at = [&](int thread, int j, int s) -> C& {
    return shared[(s * V + j) * kThreads + thread];
  };
  int half = 1;
  while (half < t.rows) half *= 2;
  for (half /= 2; half; half /= 2) {  // rows from half on are read once, and not written again
    if (row >= half && row < 2 * half)
#pragma unroll
      for (int j = 0; j < V; ++j)
#pragma unroll
        for (int s = 0; s < kSums; ++s) at(threadIdx.x, j, s) = total[j][s];
    __syncthreads();
    if (row < half && row + half < t.rows)
#pragma unroll
      for (int j = 0; j < V; ++j)
#pragma unroll
        for (int s = 0; s < kSums; ++s) total[j][s] += at(threadIdx.x + half * t.lanes, j, s);
  }
  if (inside && row == 0)
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int j = 0; j < V; ++j)
        sums[((split * kSums + s) * batch + n) * neurons + k + j] = total[j][s];
}

// out[i] = sum of parts[split][i] in order.
template <class C, int V>
__global__ void __launch_bounds__(kThreads)
    add_parts(const C* parts, int64_t splits, int64_t size, C* out) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= size) return;
  Vec<C, V> total = load<C, V>(parts + i);
  for (int64_t s = 1; s < splits; ++s) {
    const Vec<C, V> part = load<C, V>(parts + s * size + i);
#pragma unroll
    for (int j = 0; j < V; ++j) total.at[j] += part.at[j];
  }
  store<C, V>(out + i, total);
}

int64_t sums_of(const NeuronLayout& l) { return kSums * l.batch * l.neurons; }

Tiles tiles_of(const EpilogueGrad& e, int lanes_of_16_bytes) {
  const NeuronLayout& l = e.layout;
  const bool whole = l.neurons % lanes_of_16_bytes == 0;
  const bool wide = whole && aligned(e.grad, e.y, e.u, e.dz, e.g);
  const int64_t vectors = wide ? l.neurons / lanes_of_16_bytes : l.neurons;
  Tiles t{};
  t.tiles = static_cast<unsigned>(ceil_div(vectors, kThreads));
  t.lanes = static_cast<int>(ceil_div(vectors, t.tiles));
  const int64_t rows = kThreads / t.lanes;
  t.rows = static_cast<int>(rows < l.inner ? rows : l.inner);
  const int64_t wanted = ceil_div(kFill, l.batch * t.tiles);
  const int64_t allowed = ceil_div(l.inner, kPixels * t.rows);
  t.pixels = ceil_div(l.inner, wanted < allowed ? wanted : allowed);
  t.splits = static_cast<unsigned>(ceil_div(l.inner, t.pixels));
  return t;
}

template <class T, int V>
Error run_planes(const EpilogueGrad& e, Stream stream) {
  constexpr int64_t kTurns = 16;  // more of them, and a whole block takes the row
  const int64_t slots = ceil_div(e.layout.inner, V) + 1;
  int lanes = kThreads;
  if (slots <= kTurns * kWarp)
    for (lanes = 1; lanes < kWarp && lanes < slots - 1;) lanes *= 2;
  const int64_t rows = e.layout.batch * e.layout.neurons;
  if (rows > UINT32_MAX) return "the tensor has too many neurons and samples";
  return launch(grad_planes<T, V>, ceil_div(rows * lanes, kThreads), kThreads, stream, e, lanes);
}

template <class T, int V>
Error run_channels_last(const EpilogueGrad& e, const Tiles& t, Stream stream) {
  using C = Compute<T>;
  const bool split = e.sums && t.splits > 1;
  C* sums = static_cast<C*>(split ? e.workspace : e.sums);
  if (Error error = launch(grad_channels_last<T, V>, e.layout.batch * t.tiles * t.splits,
                           int64_t{t.lanes} * t.rows, stream, e, t, sums))
    return error;
  if (!split) return nullptr;
  const int64_t size = sums_of(e.layout);
  const auto add = [&](auto kernel, int64_t lanes) {
    return launch(kernel, ceil_div(size, lanes * kThreads), kThreads, stream, sums, t.splits, size,
                  static_cast<C*>(e.sums));
  };
  const bool wide = size % kLanes<C> == 0 && aligned(sums, e.sums);
  return wide ? add(add_parts<C, kLanes<C>>, kLanes<C>) : add(add_parts<C, 1>, 1);
}

bool is_empty(const NeuronLayout& l) { return l.batch == 0 || l.neurons == 0 || l.inner == 0; }

}  // namespace

int64_t epilogue_grad_workspace(const EpilogueGrad& e) {
  if (!e.layout.channels_last || !e.sums || is_empty(e.layout)) return 0;
  int64_t bytes = 0;
  with_element(e.element, [&](auto zero) {
    using T = decltype(zero);
    const int64_t splits = tiles_of(e, kLanes<T>).splits;
    bytes = splits > 1 ? splits * sums_of(e.layout) * sizeof(Compute<T>) : 0;
    return Error{};
  });
  return bytes;
}

Error epilogue_grad(const EpilogueGrad& e, Stream stream) {
  if (is_empty(e.layout)) return nullptr;
  return with_element(e.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kLanes<T>;
    const bool wide = aligned(e.grad, e.y, e.u, e.dz, e.g);
    if (!e.layout.channels_last)
      return wide ? run_planes<T, V>(e, stream) : run_planes<T, 1>(e, stream);
    const Tiles t = tiles_of(e, V);
    return wide && e.layout.neurons % V == 0 ? run_channels_last<T, V>(e, t, stream)
                                             : run_channels_last<T, 1>(e, t, stream);
  });
}

}  // namespace mnp::cuda
