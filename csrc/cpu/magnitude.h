// Norms of rows of any element type. Included once per instruction set; see isa.inl.
#pragma once

// A vector of absolute values, as bits of the type T they are computed in. As integers they have
// the order of the values, with NaN above infinity.
template <Element element>
struct Absolute;

template <class Float, class Int, Int magnitude_bits>
struct AbsoluteFloat {
  using Stored = Float;
  using T = Float;
  using Bits = Vec<Int>;
  static Bits load(const Stored* p, int64_t count) {
    return reinterpret_cast<Bits>(load_some<T>(p, count)) & magnitude_bits;
  }
};
template <>
struct Absolute<Element::f32> : AbsoluteFloat<float, int32_t, INT32_MAX> {};
template <>
struct Absolute<Element::f64> : AbsoluteFloat<double, int64_t, INT64_MAX> {};

// Half types, one in the low bits of each lane.
struct AbsoluteHalf {
  using Stored = uint16_t;
  using T = float;
  using Bits = Vec<int32_t>;
  static Bits widened(const Stored* p, int64_t count) {
    typedef Stored Half __attribute__((vector_size(MNP_VEC_BYTES / 2)));
    typedef Stored Unaligned __attribute__((vector_size(MNP_VEC_BYTES / 2), aligned(2), may_alias));
    Half half{};
    if (count >= VecOf<T>::lanes)
      half = *reinterpret_cast<const Unaligned*>(p);
    else
      for (int64_t j = 0; j < count; ++j) half[j] = p[j];
    return __builtin_convertvector(half, Bits) & 0x7fff;
  }
};
template <>
struct Absolute<Element::bf16> : AbsoluteHalf {
  static Bits load(const Stored* p, int64_t count) { return widened(p, count) << 16; }
};
template <>
struct Absolute<Element::f16> : AbsoluteHalf {
  static Bits load(const Stored* p, int64_t count) {
    const Bits moved = widened(p, count) << 13;
    // The exponent's bias is 15 in a half and 127 in a float; infinity and NaN have all ones.
    const Bits finite = reinterpret_cast<Bits>(reinterpret_cast<Vec<T>>(moved) * T(0x1p112));
    return moved >= (0x7c00 << 13) ? moved | 0x7f800000 : finite;
  }
};

// Partial results side by side hide the latency of an addition and bound the rounding error.
constexpr int64_t kChains = 8;

template <Norm norm, class A>
typename A::T row_norm(const typename A::Stored* row, int64_t size) {
  using T = typename A::T;
  using Bits = typename A::Bits;
  constexpr int64_t L = VecOf<T>::lanes;
  const auto join = [](Vec<T>& total, Vec<T> v) {
    if constexpr (norm == Norm::linf) {
      const Bits a = reinterpret_cast<Bits>(total), b = reinterpret_cast<Bits>(v);
      total = reinterpret_cast<Vec<T>>(a > b ? a : b);
    } else {
      total += v;
    }
  };
  const auto term = [](Bits bits) {
    const Vec<T> v = reinterpret_cast<Vec<T>>(bits);
    return norm == Norm::l2 ? v * v : v;
  };
  Vec<T> part[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * L <= size; i += kChains * L)
    for (int64_t c = 0; c < kChains; ++c) join(part[c], term(A::load(row + i + c * L, L)));
  for (int64_t c = 0; i < size; i += L, ++c) join(part[c], term(A::load(row + i, size - i)));
  for (int64_t half = kChains / 2; half; half /= 2)
    for (int64_t c = 0; c < half; ++c) join(part[c], part[c + half]);
  T total = 0;
  for (int64_t j = 0; j < L; ++j)
    total = norm == Norm::linf ? max(total, T(part[0][j])) : total + part[0][j];
  return norm == Norm::l2 ? sqrt(total) : total;
}

template <Element element, Norm norm>
void row_norms(const NeuronRows& a, int64_t begin, int64_t end) {
  using A = Absolute<element>;
  const auto* rows = static_cast<const typename A::Stored*>(a.weights);
  for (int64_t r = begin; r < end; ++r)
    static_cast<typename A::T*>(a.norms)[r] = row_norm<norm, A>(rows + r * a.stride, a.size);
}

template <Element element>
void row_norms(const NeuronRows& a, int64_t begin, int64_t end) {
  if (a.norm == Norm::l1) return row_norms<element, Norm::l1>(a, begin, end);
  if (a.norm == Norm::l2) return row_norms<element, Norm::l2>(a, begin, end);
  row_norms<element, Norm::linf>(a, begin, end);
}

inline int64_t magnitude_scratch(const NeuronRows& a) {
  if (a.norm != Norm::spectral) return 0;
  return a.element == Element::f64 ? spectral_scratch<double>(a) : spectral_scratch<float>(a);
}

inline void magnitude(const NeuronRows& a, int64_t begin, int64_t end, void* scratch) {
  if (a.norm == Norm::spectral) {
    if (a.element == Element::f64) return row_spectral<double>(a, begin, end, scratch);
    return row_spectral<float>(a, begin, end, scratch);
  }
  if (a.element == Element::f32) return row_norms<Element::f32>(a, begin, end);
  if (a.element == Element::f64) return row_norms<Element::f64>(a, begin, end);
  if (a.element == Element::f16) return row_norms<Element::f16>(a, begin, end);
  row_norms<Element::bf16>(a, begin, end);
}
