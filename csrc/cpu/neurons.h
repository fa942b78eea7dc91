// Per-neuron passes: the epilogue on its own, its gradient, the mask step.
// Included once per instruction set; see isa.inl.
#pragma once

// Neurons whose affine map is two vectors, of gains and offsets, in place of four.
constexpr int64_t kAffine = 1024;

// Pixels [begin, end), all of this sample's mask, whose u is given.
template <class T>
inline void write_pixels(const Epilogue<T>& given, int64_t sample, int64_t begin, int64_t end,
                         int64_t neurons, const T* u, T* y) {
  constexpr int64_t L = VecOf<T>::lanes;
  Epilogue<T> e = given;  // no store can change it
  e.mask += sample * e.mask_stride, e.mask_stride = 0;
  const bool is_affine = !e.u && !e.residual && !e.active;
  const int64_t whole = is_affine ? neurons / L * L : 0;
  alignas(64) T gain[kAffine], offset[kAffine];
  for (int64_t first = 0; first < whole; first += kAffine) {
    const int64_t count = min(kAffine, whole - first);
    for (int64_t k = 0; k < count; k += L) {
      const Affine<T> affine(load<T>(e.mask + first + k), load<T>(e.scale + first + k),
                             load<T>(e.shift + first + k), load<T>(e.bias + first + k));
      store<T>(gain + k, affine.gain);
      store<T>(offset + k, affine.offset);
    }
    for (int64_t at = begin * neurons + first; at < end * neurons; at += neurons)
      for (int64_t k = 0; k < count; k += L) {
        const Vec<T> z = load<T>(gain + k) * load<T>(u + at + k) + load<T>(offset + k);
        store<T>(y + at + k, e.relu ? relu(z) : z);
      }
  }
  if (whole < neurons)
    for (int64_t at = begin * neurons + whole; at < end * neurons; at += neurons)
      write_pixel(&e, u + at, 0, whole, neurons - whole, y, at);
}

template <class T>
void epilogue_forward(const NeuronLayout& layout, const Epilogue<T>& e, const T* u, T* y,
                      int64_t begin, int64_t end) {
  if (layout.channels_last) {
    for (int64_t r = begin, stop; r < end; r = stop) {
      const int64_t n = r / layout.inner;
      stop = e.mask_stride ? min(end, (n + 1) * layout.inner) : end;
      write_pixels(e, n, r, stop, layout.neurons, u, y);
    }
    return;
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / layout.neurons, k = r % layout.neurons, at = r * layout.inner;
    const T mask = e.mask[n * e.mask_stride + k], bias = e.bias[k];
    const T scale = e.scale[k], shift = e.shift[k];
    for (int64_t i = 0; i < layout.inner; ++i) {
      T z = mask * (scale * u[at + i] + shift) + bias;
      if (e.residual) z += e.residual[at + i];
      y[at + i] = e.relu ? relu(z) : z;
    }
  }
}

// Partial sums over this many elements bound the rounding error of long reductions.
constexpr int64_t kPartial = 64;

template <class T>
struct Sums {
  T dz = 0, t = 0, u = 0;
  void add(const Sums& o) {
    dz += o.dz;
    t += o.t;
    u += o.u;
  }
};

template <class T>
void epilogue_grad_planes(const EpilogueGrad<T>& a, int64_t n, int64_t k) {
  const NeuronLayout& layout = a.layout;
  const int64_t at = (n * layout.neurons + k) * layout.inner;
  const T scale = a.scale[k], shift = a.shift[k], gain = a.mask[n * a.mask_stride + k] * scale;
  const T more = a.add_to_u ? a.add_to_u[k] : T(0);
  Sums<T> total;
  for (int64_t start = 0; start < layout.inner; start += kPartial) {
    Sums<T> part;
    const int64_t stop = min(layout.inner, start + kPartial);
    for (int64_t i = at + start; i < at + stop; ++i) {
      const T dz = a.y && a.y[i] <= 0 ? T(0) : a.grad[i];
      if (a.dz) a.dz[i] = dz;
      if (a.g) a.g[i] = dz * gain + more;
      part.dz += dz;
      if (a.u) {
        part.t += dz * (scale * a.u[i] + shift);
        part.u += dz * a.u[i];
      }
    }
    total.add(part);
  }
  if (a.sums) {
    const int64_t plane = layout.batch * layout.neurons, s = n * layout.neurons + k;
    a.sums[s] = total.dz;
    a.sums[plane + s] = total.t;
    a.sums[2 * plane + s] = total.u;
  }
}

// A strip of up to kStrip neurons of one sample, channels last.
constexpr int64_t kStrip = 64;

constexpr int64_t kAhead = 8;  // pixels

// Asks for what a later pixel reads and writes: its strip may lie pages away from this one.
template <class T>
inline void prefetch_strip(const EpilogueGrad<T>& a, int64_t at, int64_t at_g) {
  __builtin_prefetch(a.grad + at);
  if (a.u) __builtin_prefetch(a.u + at);
  if (a.y) __builtin_prefetch(a.y + at);
  if (a.residual) __builtin_prefetch(a.residual + at);
  if (a.dz) __builtin_prefetch(a.dz + at, 1);
  if (a.g) __builtin_prefetch(a.g + at_g, 1);
}

// V vectors of neurons [first, first + count) of pixels [start, stop) of a sample. Their sums stay
// in registers and are added to total[3][kStrip]. Whole: all lanes of the last vector exist.
template <class T, int V, bool Whole>
[[gnu::noinline]] void epilogue_grad_lanes(const EpilogueGrad<T>& given, int64_t n, int64_t start,
                                           int64_t stop, int64_t first, int64_t count, T* total) {
  constexpr int L = VecOf<T>::lanes;
  const EpilogueGrad<T> a = given;  // no store can change it
  const int64_t neurons = a.layout.neurons;
  Vec<T> scale[V], shift[V], gain[V], more[V], bias[V], inverse[V], sums[3][V];
  int64_t left[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t k = first + v * L;
    left[v] = Whole ? L : count - v * L;
    scale[v] = load_some<T>(a.scale + k, left[v]);
    shift[v] = load_some<T>(a.shift + k, left[v]);
    const Vec<T> mask = load_some<T>(a.mask + n * a.mask_stride + k, left[v]);
    gain[v] = mask * scale[v];
    more[v] = a.add_to_u ? load_some<T>(a.add_to_u + k, left[v]) : Vec<T>{};
    if (a.z) bias[v] = load_some<T>(a.bias + k, left[v]), inverse[v] = T(1) / mask;
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) sums[s][v] = Vec<T>{};
  }
  for (int64_t pixel = n * a.layout.inner + start; pixel < n * a.layout.inner + stop; ++pixel)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t at = pixel * neurons + first + v * L, at_g = pixel * a.g_stride + first + v * L;
      prefetch_strip(a, at + kAhead * neurons, at_g + kAhead * a.g_stride);
      // All loads first: one behind a store to the same place of another page would wait for it.
      Vec<T> dz = load_some<T>(a.grad + at, left[v]);
      const Vec<T> u = a.u ? load_some<T>(a.u + at, left[v]) : Vec<T>{};
      Vec<T> z = a.z ? load_some<T>(a.z + at, left[v]) : Vec<T>{};
      if (a.residual) z -= load_some<T>(a.residual + at, left[v]);
      if (a.y) dz = load_some<T>(a.y + at, left[v]) <= T(0) ? Vec<T>{} : dz;
      if (a.active) dz = load_flags<T>(a.active + at, left[v]) ? dz : Vec<T>{};
      if (a.dz) store_some<T>(a.dz + at, dz, left[v]);
      if (a.g) store_some<T>(a.g + at_g, dz * gain[v] + more[v], left[v]);
      sums[0][v] += dz;
      if (a.z) sums[1][v] += dz * ((z - bias[v]) * inverse[v]);
      if (!a.u) continue;
      sums[1][v] += dz * (scale[v] * u + shift[v]);
      sums[2][v] += dz * u;
    }
  for (int s = 0; s < 3; ++s)
    for (int v = 0; v < V; ++v) {
      T* to = total + s * kStrip + v * L;
      store<T>(to, load<T>(to) + sums[s][v]);
    }
}

template <class T>
void epilogue_grad_strip(const EpilogueGrad<T>& a, int64_t n, int64_t first, int64_t count) {
  constexpr int64_t L = VecOf<T>::lanes;
  const NeuronLayout& layout = a.layout;
  alignas(64) T total[3 * kStrip] = {};
  for (int64_t start = 0; start < layout.inner; start += kPartial) {
    const int64_t stop = min(layout.inner, start + kPartial);
    for (int64_t j = 0; j < count; j += 2 * L) {
      const int64_t left = count - j, k = first + j;
      if (left >= 2 * L)
        epilogue_grad_lanes<T, 2, true>(a, n, start, stop, k, left, total + j);
      else if (left > L)
        epilogue_grad_lanes<T, 2, false>(a, n, start, stop, k, left, total + j);
      else if (left == L)
        epilogue_grad_lanes<T, 1, true>(a, n, start, stop, k, left, total + j);
      else
        epilogue_grad_lanes<T, 1, false>(a, n, start, stop, k, left, total + j);
    }
  }
  if (!a.sums) return;
  for (int s = 0; s < 3; ++s)
    copy(total + s * kStrip, count, a.sums + (s * layout.batch + n) * layout.neurons + first);
}

template <class T>
void epilogue_grad(const EpilogueGrad<T>& a, int64_t begin, int64_t end, int64_t first,
                   int64_t last) {
  for (int64_t n = begin; n < end; ++n)
    if (a.layout.channels_last)
      for (int64_t k = first; k < last; k += kStrip)
        epilogue_grad_strip(a, n, k, min(kStrip, last - k));
    else
      for (int64_t k = first; k < last; ++k) epilogue_grad_planes(a, n, k);
}

template <class T>
void mask_update(const MaskUpdate<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T grad = a.grad[i] + a.penalty * a.magnitude[i];
    a.velocity[i] = a.momentum * a.velocity[i] + grad;
    const T mask = a.mask[i] - a.lr * a.velocity[i];
    a.mask[i] = mask < 0 ? T(0) : mask > 1 ? T(1) : mask;
  }
}
