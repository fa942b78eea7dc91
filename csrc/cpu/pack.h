// Reads weights in any layout as vectors of neighbouring outputs. Included once per instruction
// set; see isa.inl.
#pragma once

// Which lanes of two vectors, the second one's behind the first one's, make two others. Constants
// in memory: compilers make vectors of such lanes one by one.
template <class T>
struct Lanes {
  static constexpr int L = VecOf<T>::lanes;
  typedef decltype(Vec<T>{} < Vec<T>{}) Index;
  alignas(sizeof(Index)) decltype(Index{}[0] + 0) upper[L], lower[L];
};

// In turn, of the first and of the second half of each S lanes.
template <class T, int S>
struct Interleaved : Lanes<T> {
  constexpr Interleaved() : Lanes<T>{} {
    for (int j = 0; j < this->L; ++j) {
      this->upper[j] = j / S * S + j % S / 2 + (j & 1) * this->L;
      this->lower[j] = this->upper[j] + S / 2;
    }
  }
};

// Blocks of S lanes exchanged across the diagonal.
template <class T, int S>
struct Exchanged : Lanes<T> {
  constexpr Exchanged() : Lanes<T>{} {
    for (int j = 0; j < this->L; ++j) {
      this->upper[j] = j & S ? j - S + this->L : j;
      this->lower[j] = j & S ? j + this->L : j + S;
    }
  }
};

template <template <class, int> class Kind, class T, int S>
[[gnu::always_inline]] inline void shuffle(Vec<T> a, Vec<T> b, Vec<T>& upper, Vec<T>& lower) {
  static constexpr Kind<T, S> lanes;
  typedef typename Lanes<T>::Index Index;
  upper = __builtin_shuffle(a, b, *reinterpret_cast<const Index*>(lanes.upper));
  lower = __builtin_shuffle(a, b, *reinterpret_cast<const Index*>(lanes.lower));
}

// Blocks of S by S, and larger ones, exchanged across the diagonal.
template <class T, int S>
inline void exchange(Vec<T>* rows) {
  constexpr int L = VecOf<T>::lanes;
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & S)) shuffle<Exchanged, T, S>(rows[i], rows[i + S], rows[i], rows[i + S]);
    exchange<T, 2 * S>(rows);
  }
}

// out[i][j] = in[j][i], in place: in blocks of 128 bits, within which lanes are interleaved by one
// instruction on all processors, and then the blocks.
template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr int L = VecOf<T>::lanes, S = 16 / sizeof(T), kHalf = S / 2;
#pragma GCC unroll 2
  for (int step = 1; step < S; step *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const int to = i / S * S + i % S * 2;
      if (i % S < kHalf)
        shuffle<Interleaved, T, S>(rows[i], rows[i + kHalf], next[to], next[to + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
  exchange<T, S>(rows);
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
