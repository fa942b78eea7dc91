// One dimension of Winograd's convolutions: y = At((G w) * (Bt d)) computes kOut outputs from kIn
// inputs with kPoints products, and the gradient of w is Gt((A dy) * (Bt d)). Included once per
// instruction set; see isa.inl and docs/kernels.md.
#pragma once

// What forms of stride 1 share: each product has weights of its own, and tiles of inputs start
// where the outputs do.
template <class Type, int64_t Points, int64_t Taps>
struct UnitStride {
  using T = Type;
  static constexpr int64_t kIn = Points, kPoints = Points, kWeights = Points, kTaps = Taps,
                           kOut = Points - Taps + 1;
  static constexpr int64_t weight_of(int64_t point) { return point; }
  static constexpr int64_t first_input(int64_t out) { return out; }
};

// The points 0, 1, -1, 1/2, -2 and infinity.
template <class Type, int64_t Taps>
struct SixPoints : UnitStride<Type, 6, Taps> {
  using T = Type;
  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    const Vec<T> odd = d[3] - d[1], even = d[4] - d[2];
    out[0] = (d[0] + d[4]) - T(2) * d[2] + T(1.5) * odd;
    out[out_step] = (d[4] - d[1]) + T(0.5) * d[2] + T(2.5) * d[3];
    out[2 * out_step] = (d[4] + d[1]) - T(2.5) * d[2] + T(0.5) * d[3];
    out[3 * out_step] = even + T(2) * odd;
    out[4 * out_step] = even - T(0.5) * odd;
    out[5 * out_step] = (d[1] + d[5]) - T(2) * d[3] + T(1.5) * even;
  }
};

// Four outputs of three taps.
template <class T>
struct F4 : SixPoints<T, 3> {
  // G, whose rows carry the divisors that Bt is then free of.
  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> a = w[0], b = w[step], c = w[2 * step];
    const Vec<T> ends = a + c, wide = a + T(4) * c;
    out[0] = a;
    out[out_step] = (ends + b) * T(1. / 3);
    out[2 * out_step] = (b - ends) * T(1. / 3);
    out[3 * out_step] = (a + T(0.5) * b + T(0.25) * c) * T(-16. / 15);
    out[4 * out_step] = (wide - T(2) * b) * T(1. / 15);
    out[5 * out_step] = c;
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2];
    out[0] = (m[0] + sum) + (m[3] + m[4]);
    out[out_step] = difference + T(0.5) * m[3] - T(2) * m[4];
    out[2 * out_step] = sum + T(0.25) * m[3] + T(4) * m[4];
    out[3 * out_step] = difference + T(0.125) * m[3] - T(8) * m[4] + m[5];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out) {
    const Vec<T> even = y[0] + y[2], odd = y[1] + y[3];
    out[0] = y[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = (y[0] + T(0.25) * y[2]) + (T(0.5) * y[1] + T(0.125) * y[3]);
    out[4] = (y[0] + T(4) * y[2]) - (T(2) * y[1] + T(8) * y[3]);
    out[5] = y[3];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* out) {
    const Vec<T> sum = (m[1] + m[2]) * T(1. / 3), difference = (m[1] - m[2]) * T(1. / 3);
    const Vec<T> half = m[3] * T(-4. / 15), two = m[4] * T(1. / 15);
    out[0] = m[0] + difference + (T(4) * half + two);
    out[1] = sum + T(2) * (half - two);
    out[2] = difference + (half + T(4) * two) + m[5];
  }
};

// Two outputs of five taps.
template <class T>
struct F2Of5 : SixPoints<T, 5> {
  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> a = w[0], b = w[step], c = w[2 * step], d = w[3 * step], e = w[4 * step];
    const Vec<T> even = a + c + e, odd = b + d;
    out[0] = a;
    out[out_step] = (even + odd) * T(1. / 3);
    out[2 * out_step] = (odd - even) * T(1. / 3);
    out[3 * out_step] =
        (a + T(0.5) * b + T(0.25) * c + T(0.125) * d + T(0.0625) * e) * T(-16. / 15);
    out[4 * out_step] = ((a + T(4) * c + T(16) * e) - (T(2) * b + T(8) * d)) * T(1. / 15);
    out[5 * out_step] = e;
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    out[0] = (m[0] + (m[1] + m[2])) + (m[3] + m[4]);
    out[out_step] = (m[1] - m[2]) + T(0.5) * m[3] - T(2) * m[4] + m[5];
  }
};

// Two outputs of three taps: the points 0, 1, -1 and infinity.
template <class T>
struct F2 : UnitStride<T, 4, 3> {
  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> ends = w[0] + w[2 * step];
    out[0] = w[0];
    out[out_step] = (ends + w[step]) * T(0.5);
    out[2 * out_step] = (ends - w[step]) * T(0.5);
    out[3 * out_step] = w[2 * step];
  }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    out[0] = d[0] - d[2];
    out[out_step] = d[1] + d[2];
    out[2 * out_step] = d[2] - d[1];
    out[3 * out_step] = d[1] - d[3];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    out[0] = m[0] + m[1] + m[2];
    out[out_step] = m[1] - m[2] - m[3];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out) {
    out[0] = y[0];
    out[1] = y[0] + y[1];
    out[2] = y[0] - y[1];
    out[3] = -y[1];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* out) {
    const Vec<T> sum = (m[1] + m[2]) * T(0.5);
    out[0] = m[0] + sum;
    out[1] = (m[1] - m[2]) * T(0.5);
    out[2] = sum + m[3];
  }
};

// Images of two rows and columns with a row of zeros around them, which a tile of F2 would read:
// y0 = d0 w1 + d1 w2 and y1 = d0 w0 + d1 w1 take three products.
template <class Type>
struct F2Whole {
  using T = Type;
  static constexpr int64_t kIn = 2, kOut = 2, kPoints = 3, kWeights = 3, kTaps = 3;
  static constexpr int64_t weight_of(int64_t point) { return point; }
  static constexpr int64_t first_input(int64_t out) { return out + 1; }

  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    out[0] = w[step];
    out[out_step] = w[2 * step] - w[step];
    out[2 * out_step] = w[0] - w[step];
  }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    out[0] = d[0] + d[1];
    out[out_step] = d[1];
    out[2 * out_step] = d[0];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    out[0] = m[0] + m[1];
    out[out_step] = m[0] + m[2];
  }
};

// The outer taps of a stride of 2, which meet every second input. Four sums of two products each
// with five products: the points 0, 1, -1, 1/2 and infinity.
template <class Type>
struct FourOfTwoTaps {
  using T = Type;
  static constexpr int64_t kOut = 4, kPoints = 5;

  static void weight(Vec<T> a, Vec<T> b, Vec<T>* out, int64_t out_step) {
    out[0] = a;
    out[out_step] = (a + b) * T(0.5);
    out[2 * out_step] = (a - b) * T(1. / 6);
    out[3 * out_step] = (a + T(0.5) * b) * T(8. / 3);
    out[4 * out_step] = b;
  }

  static void input(const Vec<T>* d, int64_t step, Vec<T>* out, int64_t out_step) {
    const Vec<T> a = d[step], b = d[2 * step], c = d[3 * step], odd = c - a;
    out[0] = (d[0] - b) + T(2) * odd;
    out[out_step] = (b - a) + T(2) * c;
    out[2 * out_step] = T(3) * b - (a + T(2) * c);
    out[3 * out_step] = -odd;
    out[4 * out_step] = (d[4 * step] - b) - T(0.5) * odd;
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2];
    out[0] = (m[0] + sum) + m[3];
    out[out_step] = difference + T(0.5) * m[3];
    out[2 * out_step] = sum + T(0.25) * m[3];
    out[3 * out_step] = (difference + m[4]) + T(0.125) * m[3];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out) {
    const Vec<T> even = y[0] + y[2], odd = y[1] + y[3];
    out[0] = y[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = (y[0] + T(0.25) * y[2]) + (T(0.5) * y[1] + T(0.125) * y[3]);
    out[4] = y[3];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* a, Vec<T>* b) {
    const Vec<T> one = m[1] * T(0.5), minus_one = m[2] * T(1. / 6), half = m[3] * T(4. / 3);
    *a = m[0] + (one + minus_one) + T(2) * half;
    *b = (one - minus_one) + half + m[4];
  }
};

// Two sums with three products: the points 0, 1 and infinity.
template <class Type>
struct TwoOfTwoTaps {
  using T = Type;
  static constexpr int64_t kOut = 2, kPoints = 3;

  static void weight(Vec<T> a, Vec<T> b, Vec<T>* out, int64_t out_step) {
    out[0] = a;
    out[out_step] = a + b;
    out[2 * out_step] = b;
  }

  static void input(const Vec<T>* d, int64_t step, Vec<T>* out, int64_t out_step) {
    out[0] = d[0] - d[step];
    out[out_step] = d[step];
    out[2 * out_step] = d[2 * step] - d[step];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    out[0] = m[0] + m[1];
    out[out_step] = m[1] + m[2];
  }
};

// The first points are those of the outer taps, the others products with the middle tap.
template <class Outer>
struct StrideTwo {
  using T = typename Outer::T;
  static constexpr int64_t kSums = Outer::kOut, kMiddle = Outer::kPoints, kTaps = 3,
                           kPoints = kMiddle + kSums, kWeights = kMiddle + 1;
  static constexpr int64_t weight_of(int64_t point) { return point < kMiddle ? point : kMiddle; }

  static void weight(const Vec<T>* w, int64_t step, Vec<T>* out, int64_t out_step) {
    Outer::weight(w[0], w[2 * step], out, out_step);
    out[kMiddle * out_step] = w[step];
  }
};

// Nine inputs give four outputs, or five give two.
template <class Outer>
struct StrideTwoOutput : StrideTwo<Outer> {
  using Base = StrideTwo<Outer>;
  using T = typename Outer::T;
  using Base::kMiddle, Base::kSums;
  static constexpr int64_t kOut = kSums, kIn = 2 * kSums + 1;
  static constexpr int64_t first_input(int64_t out) { return 2 * out; }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    Outer::input(d, 2, out, out_step);
    for (int64_t i = 0; i < kSums; ++i) out[(kMiddle + i) * out_step] = d[2 * i + 1];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    Outer::output(m, out, out_step);
    for (int64_t i = 0; i < kSums; ++i) out[i * out_step] += m[kMiddle + i];
  }

  static void output_transposed(const Vec<T>* y, Vec<T>* out) {
    Outer::output_transposed(y, out);
    for (int64_t i = 0; i < kSums; ++i) out[kMiddle + i] = y[i];
  }

  static void weight_transposed(const Vec<T>* m, Vec<T>* out) {
    Outer::weight_transposed(m, out, out + 2);
    out[1] = m[kMiddle];
  }
};

// Its transpose, with an odd padding: five gradients give those of eight inputs, or three those of
// four. The first, third, ... input meets only the middle tap.
template <class Outer>
struct StrideTwoGrad : StrideTwo<Outer> {
  using Base = StrideTwo<Outer>;
  using T = typename Outer::T;
  using Base::kMiddle, Base::kSums;
  static constexpr int64_t kIn = kSums + 1, kOut = 2 * kSums;
  static constexpr int64_t first_input(int64_t out) { return out / 2; }

  static void input(const Vec<T>* d, Vec<T>* out, int64_t out_step) {
    Outer::input(d, 1, out, out_step);
    for (int64_t i = 0; i < kSums; ++i) out[(kMiddle + i) * out_step] = d[i];
  }

  static void output(const Vec<T>* m, Vec<T>* out, int64_t out_step) {
    Outer::output(m, out + out_step, 2 * out_step);
    for (int64_t i = 0; i < kSums; ++i) out[2 * i * out_step] = m[kMiddle + i];
  }
};

template <class T>
using F4Stride2 = StrideTwoOutput<FourOfTwoTaps<T>>;
template <class T>
using F4Stride2Grad = StrideTwoGrad<FourOfTwoTaps<T>>;
template <class T>
using F2Stride2 = StrideTwoOutput<TwoOfTwoTaps<T>>;
template <class T>
using F2Stride2Grad = StrideTwoGrad<TwoOfTwoTaps<T>>;
