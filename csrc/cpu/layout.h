// Images between channels-last and contiguous: transposed matrices. Included once per instruction
// set; see isa.inl.
#pragma once

// Rows that are transposed together: what they become fills two cache lines of each new row.
template <class T>
constexpr int64_t kTransposed = 128 / sizeof(T);

template <class T>
inline int64_t strips_of(const Transpose<T>& a) {
  return (a.rows + kTransposed<T> - 1) / kTransposed<T>;
}

template <class T>
int64_t transpose_strips(const Transpose<T>& a) {
  return a.batch * strips_of(a);
}

// L rows and columns from `from` on.
template <class T>
[[gnu::always_inline]] inline void transpose_block(const T* from, int64_t cols, T* to,
                                                   int64_t rows) {
  constexpr int64_t L = VecOf<T>::lanes;
  Vec<T> block[L];
#pragma GCC unroll 16
  for (int64_t i = 0; i < L; ++i) {
    __builtin_prefetch(from + i * cols + 192 / sizeof(T));
    block[i] = load<T>(from + i * cols);
  }
  transpose<T>(block);
#pragma GCC unroll 16
  for (int64_t j = 0; j < L; ++j) store<T>(to + j * rows, block[j]);
}

// Strips [begin, end) of all matrices.
template <class T>
void transpose_matrices(const Transpose<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = VecOf<T>::lanes, kLine = 64 / sizeof(T);
  const int64_t strips = strips_of(a), size = a.rows * a.cols;
  // Lines of rows that lie far apart may share cache sets: those are finished first. They are the
  // old rows where there are more columns, else the new ones.
  const int64_t wide = a.cols > a.rows && L < kLine ? kLine : L;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = s % strips * kTransposed<T>, used = min(kTransposed<T>, a.rows - first);
    const T* const from = a.from + s / strips * size + first * a.cols;
    T* const to = a.to + s / strips * size + first;
    const int64_t whole = used / L * L;
    int64_t j = 0;
    for (; whole > 0 && j + wide <= a.cols; j += wide)
      for (int64_t i = 0; i < whole; i += L)
        for (int64_t k = j; k < j + wide; k += L)
          transpose_block<T>(from + i * a.cols + k, a.cols, to + k * a.rows + i, a.rows);
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t i = k < j ? whole : 0; i < used; ++i) to[k * a.rows + i] = from[i * a.cols + k];
  }
}
