// Reads weights in any layout as vectors of neighbouring outputs. Included once per instruction
// set; see isa.inl.
#pragma once

// Lanes of two rows, S apart, after their blocks of S by S are exchanged across the diagonal.
// Constants in memory: compilers make vectors of such lanes one by one.
template <class T, int S>
struct Exchanged {
  static constexpr int L = VecOf<T>::lanes;
  typedef decltype(Vec<T>{} < Vec<T>{}) Index;
  alignas(sizeof(Index)) decltype(Index{}[0] + 0) upper[L], lower[L];
  constexpr Exchanged() : upper{}, lower{} {
    for (int j = 0; j < L; ++j) {
      upper[j] = j & S ? j - S + L : j;
      lower[j] = j & S ? j + L : j + S;
    }
  }
};

// out[i][j] = in[j][i], in place: blocks of 1, 2, 4, ... are exchanged across the diagonal.
template <class T, int S = 1>
inline void transpose(Vec<T>* rows) {
  constexpr int L = VecOf<T>::lanes;
  if constexpr (S < L) {
    static constexpr Exchanged<T, S> exchanged;
    typedef typename Exchanged<T, S>::Index Index;
    const Index upper = *reinterpret_cast<const Index*>(exchanged.upper);
    const Index lower = *reinterpret_cast<const Index*>(exchanged.lower);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & S) continue;
      const Vec<T> a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + S] = __builtin_shuffle(a, b, lower);
    }
    transpose<T, 2 * S>(rows);
  }
}

// Elements i of `used` rows as write(i, vector), for i from 0 to `columns`.
template <class T, class Write>
inline void read_columns(const T* rows, int64_t stride, int64_t used, int64_t columns,
                         Write write) {
  constexpr int64_t L = VecOf<T>::lanes, kHalf = L / 2, kFew = L / 4;
  Vec<T> block[L];
  int64_t i = 0;
  for (; used == L && i + L <= columns; i += L) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j) block[j] = load<T>(rows + j * stride + i);
    transpose<T>(block);
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j) write(i + j, block[j]);
  }
  const int64_t rest = columns - i;
  if (used == L && rest > kFew && kHalf * stride + rest >= L) {
    // Whole vectors all the same: the first half of the rows is read beyond the columns, the other
    // half in front of them, both within the rows.
    for (int64_t j = 0; j < L; ++j)
      block[j] = load<T>(rows + j * stride + (j < kHalf ? i : columns - L));
    transpose<T>(block);
    decltype(block[0] < block[0]) halves;
    for (int64_t k = 0; k < L; ++k) halves[k] = k < kHalf ? k : L + k;
    for (int64_t j = 0; j < rest; ++j)
      write(i + j, __builtin_shuffle(block[j], block[L - rest + j], halves));
    return;
  }
  for (; i < columns; ++i) {
    Vec<T> column{};
    for (int64_t j = 0; j < used; ++j) column[j] = rows[j * stride + i];
    write(i, column);
  }
}

// The weights of `used` outputs, at most a vector of them, at every tap q and channel d, as
// write(q, d, vector).
template <class T, class Write>
inline void read_weights(const Weights<T>& w, int64_t used, int64_t depth, Write write) {
  if (w.stride_j == 1) {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t q = 0; q < w.taps; ++q)
        write(q, d, load_some<T>(w.data + q * w.stride_q + d * w.stride_d, used));
  } else if (w.stride_d == 1) {
    for (int64_t q = 0; q < w.taps; ++q)
      read_columns<T>(w.data + q * w.stride_q, w.stride_j, used, depth,
                      [&](int64_t d, Vec<T> v) { write(q, d, v); });
  } else if (w.stride_q == 1 && w.stride_d == w.taps) {
    int64_t q = 0, d = 0;
    read_columns<T>(w.data, w.stride_j, used, depth * w.taps, [&](int64_t, Vec<T> v) {
      write(q, d, v);
      if (++q == w.taps) q = 0, ++d;
    });
  } else {
    for (int64_t d = 0; d < depth; ++d)
      if (w.stride_q == 1)
        read_columns<T>(w.data + d * w.stride_d, w.stride_j, used, w.taps,
                        [&](int64_t q, Vec<T> v) { write(q, d, v); });
      else
        for (int64_t q = 0; q < w.taps; ++q) {
          Vec<T> v{};
          for (int64_t j = 0; j < used; ++j)
            v[j] = w.data[j * w.stride_j + q * w.stride_q + d * w.stride_d];
          write(q, d, v);
        }
  }
}
