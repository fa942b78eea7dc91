// The largest singular value of rows that are matrices. Included once per instruction set; see
// isa.inl.
#pragma once

constexpr int64_t kTile = 8;  // rows of a block of the Gram matrix or its square
constexpr int64_t kSquares =
    24;  // bounds the relative error by 1e-8 where values lie close together

// The Gram matrix of a matrix's shorter side, padded with zeros so that blocks have no edges.
struct Gram {
  int64_t side, rows, stride;
};

template <class T>
Gram gram_of(const NeuronRows& a) {
  constexpr int64_t L = VecOf<T>::lanes;
  const int64_t side = min(a.columns, a.size / a.columns);
  return {side, (side + kTile - 1) / kTile * kTile, (side + L - 1) / L * L};
}

// Three such matrices: the Gram matrix, a power of it, and the next one.
template <class T>
int64_t spectral_scratch(const NeuronRows& a) {
  const Gram g = gram_of<T>(a);
  return 3 * g.rows * g.stride * int64_t(sizeof(T));
}

// N rows of a block of the products of columns.
template <class T, int64_t N = kTile>
void gram_block(const T* w, int64_t size, int64_t side, int64_t i, int64_t j, int64_t count, T* to,
                int64_t stride) {
  if constexpr (N > 1)
    if (count < N) return gram_block<T, N - 1>(w, size, side, i, j, count, to, stride);
  Vec<T> sums[N] = {};
  for (int64_t start = 0; start < size; start += side) {
    // Lanes beyond the row hold what follows; they are not stored.
    const Vec<T> v = load_some(w + start + j, size - start - j);
    for (int64_t c = 0; c < N; ++c) sums[c] += w[start + i + c] * v;
  }
  for (int64_t c = 0; c < N; ++c) store_some(to + c * stride, sums[c], side - j);
}

// Lower half of the products of columns: a matrix with at least as many rows.
template <class T>
void gram_of_columns(const T* w, int64_t size, const Gram& g, T* gram) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t j = 0; j < g.side; j += L)
    for (int64_t i = j / kTile * kTile; i < g.side; i += kTile)
      gram_block(w, size, g.side, i, j, min(kTile, g.side - i), gram + i * g.stride + j, g.stride);
}

// Lower half of the products of rows: a matrix with at least as many columns.
template <class T>
void gram_of_rows(const T* w, int64_t columns, const Gram& g, T* gram) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t i = 0; i < g.side; ++i)
    for (int64_t j = 0; j <= i; j += kTile) {
      const int64_t count = min(kTile, i + 1 - j);
      Vec<T> sums[kTile] = {};
      for (int64_t x = 0; x < columns; x += L) {
        const Vec<T> v = load_some(w + i * columns + x, columns - x);
        for (int64_t c = 0; c < count; ++c)
          sums[c] += v * load_some(w + (j + c) * columns + x, columns - x);
      }
      for (int64_t c = 0; c < count; ++c) {
        T total = 0;
        for (int64_t lane = 0; lane < L; ++lane) total += sums[c][lane];
        gram[i * g.stride + j + c] = total;
      }
    }
}

template <class T>
void squared(const T* a, const Gram& g, T* square) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t j = 0; j < g.stride; j += L)
    for (int64_t i = 0; i < g.rows; i += kTile) {
      Vec<T> sums[kTile] = {};
      for (int64_t k = 0; k < g.side; ++k) {
        const Vec<T> v = load(a + k * g.stride + j);
        for (int64_t c = 0; c < kTile; ++c) sums[c] += a[(i + c) * g.stride + k] * v;
      }
      for (int64_t c = 0; c < kTile; ++c) store(square + (i + c) * g.stride + j, sums[c]);
    }
}

template <class T>
T trace(const T* a, const Gram& g) {
  T total = 0;
  for (int64_t i = 0; i < g.side; ++i) total += a[i * g.stride + i];
  return total;
}

template <class T>
void scaled(const T* a, T factor, const Gram& g, T* result) {
  constexpr int64_t L = VecOf<T>::lanes;
  for (int64_t i = 0; i < g.rows * g.stride; i += L) store(result + i, factor * load(a + i));
}

// Powers of the Gram matrix by squaring: of trace 1, they tend to the projection on its first
// eigenvector, whatever the start. That vector's Rayleigh quotient is the eigenvalue.
template <class T>
T spectral_norm(const T* w, int64_t size, int64_t columns, const Gram& g, T* scratch) {
  constexpr T kNear = sizeof(T) == sizeof(float) ? T(1e-4) : T(1e-9);
  T *gram = scratch, *power = gram + g.rows * g.stride, *next = power + g.rows * g.stride;
  for (int64_t i = 0; i < g.rows * g.stride; ++i) gram[i] = 0;
  columns == g.side ? gram_of_columns(w, size, g, gram) : gram_of_rows(w, columns, g, gram);
  for (int64_t i = 0; i < g.side; ++i)
    for (int64_t j = 0; j < i; ++j) gram[j * g.stride + i] = gram[i * g.stride + j];
  const T total = trace(gram, g);
  if (!(total > 0) || total - total != 0) return sqrt(total);  // 0, infinity or NaN
  scaled(gram, 1 / total, g, power);
  for (int64_t step = 0; step < kSquares; ++step) {
    squared(power, g, next);
    const T rest = trace(next, g);  // 1 where one eigenvector is left
    scaled(next, 1 / rest, g, power);
    if (rest > 1 - kNear) break;
  }
  int64_t first = 0;
  for (int64_t i = 1; i < g.side; ++i)
    if (power[i * (g.stride + 1)] > power[first * (g.stride + 1)]) first = i;
  const T* v = power + first * g.stride;
  T above = 0, below = 0;
  for (int64_t i = 0; i < g.side; ++i) {
    T product = 0;
    for (int64_t j = 0; j < g.side; ++j) product += gram[i * g.stride + j] * v[j];
    above += v[i] * product;
    below += v[i] * v[i];
  }
  return sqrt(above / below);
}

template <class T>
void row_spectral(const NeuronRows& a, int64_t begin, int64_t end, void* scratch) {
  const Gram g = gram_of<T>(a);
  for (int64_t r = begin; r < end; ++r)
    static_cast<T*>(a.norms)[r] = spectral_norm(static_cast<const T*>(a.weights) + r * a.stride,
                                                a.size, a.columns, g, static_cast<T*>(scratch));
}
