// The kernels of one instruction set. The including file defines MNP_ISA (its name), MNP_VEC_BYTES
// (vector width) and MNP_ROWS (rows of the register block), and is compiled with that set's flags.
// No standard library code is instantiated here: the linker could hand it to machines without the
// set.
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mnp::cpu {
namespace {

constexpr int kRows = MNP_ROWS;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(MNP_VEC_BYTES)));
  typedef T unaligned __attribute__((vector_size(MNP_VEC_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int lanes = MNP_VEC_BYTES / sizeof(T);
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline typename VecOf<T>::type load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, typename VecOf<T>::type v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

#if defined(__AVX512F__) && MNP_VEC_BYTES == 64
// Reads and writes only the first `count` elements, if there are fewer than lanes.
inline Vec<float> load_masked(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
inline Vec<double> load_masked(const double* p, int64_t count) {
  return (Vec<double>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
}
inline void store_masked(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
}
inline void store_masked(double* p, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, (1u << count) - 1, (__m512d)v);
}
#else
template <class T>
inline Vec<T> load_masked(const T* p, int64_t count) {
  Vec<T> v{};
  for (int64_t j = 0; j < count; ++j) v[j] = p[j];
  return v;
}
template <class T>
inline void store_masked(T* p, Vec<T> v, int64_t count) {
  for (int64_t j = 0; j < count; ++j) p[j] = v[j];
}
#endif

// The first `count` elements, or a whole vector where there are more.
template <class T>
inline Vec<T> load_some(const T* p, int64_t count) {
  return count >= VecOf<T>::lanes ? load<T>(p) : load_masked(p, count);
}
template <class T>
inline void store_some(T* p, Vec<T> v, int64_t count) {
  count >= VecOf<T>::lanes ? store<T>(p, v) : store_masked(p, v, count);
}

// Asks for all lines of `Count` elements, to write them or to read them.
template <int Count, class T>
inline void prefetch(const T* p, bool write) {
  for (int i = 0; i < Count; i += 64 / int(sizeof(T)))
    write ? __builtin_prefetch(p + i, 1) : __builtin_prefetch(p + i);
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
// NaN goes through, as in torch: where one is NaN, a maximum is its second operand.
template <class T>
inline T relu(T x) {
  return x < 0 ? T(0) : x;
}
#if defined(__AVX512F__) && MNP_VEC_BYTES == 64
inline Vec<float> relu(Vec<float> x) { return (Vec<float>)_mm512_max_ps(__m512{}, (__m512)x); }
inline Vec<double> relu(Vec<double> x) { return (Vec<double>)_mm512_max_pd(__m512d{}, (__m512d)x); }
#elif defined(__AVX__) && MNP_VEC_BYTES == 32
inline Vec<float> relu(Vec<float> x) { return (Vec<float>)_mm256_max_ps(__m256{}, (__m256)x); }
inline Vec<double> relu(Vec<double> x) { return (Vec<double>)_mm256_max_pd(__m256d{}, (__m256d)x); }
#elif defined(__SSE2__) && MNP_VEC_BYTES == 16
inline Vec<float> relu(Vec<float> x) { return (Vec<float>)_mm_max_ps(__m128{}, (__m128)x); }
inline Vec<double> relu(Vec<double> x) { return (Vec<double>)_mm_max_pd(__m128d{}, (__m128d)x); }
#else
inline Vec<float> relu(Vec<float> x) { return x < 0 ? Vec<float>{} : x; }
inline Vec<double> relu(Vec<double> x) { return x < 0 ? Vec<double>{} : x; }
#endif
template <class T>
inline T max(T a, T b) {
  return a > b || a != a ? a : b;
}
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }

// clang-format off: each uses those above it.
#include "product.h"
#include "pack.h"
#include "layout.h"
#include "epilogue.h"
#include "pixels.h"
#include "dense.h"
#include "depthwise.h"
#include "narrow.h"
#include "grouped.h"
#include "direct.h"
#include "direct_rows.h"
#include "image_grad.h"
#include "living.h"
#include "weight_grad.h"
#include "spectral.h"
#include "magnitude.h"
#include "neurons.h"
#include "winograd_forms.h"
#include "winograd.h"
#include "winograd_weight.h"
// clang-format on

template <class F, class T = typename F::T>
constexpr WinogradKernels<T> make_winograd() {
  return {winograd_block<F>,        winograd_set_size<F>,   winograd_pack<F>,
          winograd_tiles<F>,        winograd_input_size<F>, winograd_input<F>,
          winograd_product_size<F>, winograd_output<F>};
}

template <class F, class T = typename F::T>
constexpr WinogradWeightKernels<T> make_winograd_weight() {
  return {winograd_weight_plan<F>, winograd_weight_tiles<F>, winograd_weight_sums<F>,
          winograd_weight_output<F>};
}

template <class T>
constexpr Kernels<T> make_kernels() {
  return {Panels<T>::kWide,
          panels_size<T>,
          panels_count<T>,
          pack_panels<T>,
          direct_scratch<T>,
          direct<T>,
          fills_vectors<T>,
          direct_rows<T>,
          image_grad_scratch<T>,
          image_grad<T>,
          depthwise_weight_grad<T>,
          weight_grad_units<T>,
          weight_grad_scratch<T>,
          weight_grad<T>,
          skewed<T>,
          epilogue_forward<T>,
          expand_scratch<T>,
          expand_neurons<T>,
          epilogue_grad<T>,
          transpose_strips<T>,
          transpose_matrices<T>,
          mask_update<T>,
          winograd_sets<T>,
          make_winograd<F2<T>>(),
          make_winograd<F2Whole<T>>(),
          make_winograd<F4<T>>(),
          make_winograd<F2Of5<T>>(),
          make_winograd<F2Stride2<T>>(),
          make_winograd<F2Stride2Grad<T>>(),
          make_winograd<F4Stride2<T>>(),
          make_winograd<F4Stride2Grad<T>>(),
          make_winograd_weight<F2<T>>(),
          make_winograd_weight<F4<T>>(),
          make_winograd_weight<F4Stride2<T>>()};
}

}  // namespace

#define MNP_CONCAT_(a, b) a##b
#define MNP_CONCAT(a, b) MNP_CONCAT_(a, b)
#define MNP_STRING_(a) #a
#define MNP_STRING(a) MNP_STRING_(a)

extern const KernelTable MNP_CONCAT(kernels_, MNP_ISA);
constexpr KernelTable MNP_CONCAT(kernels_, MNP_ISA) = {MNP_STRING(MNP_ISA), make_kernels<float>(),
                                                       make_kernels<double>(), magnitude,
                                                       magnitude_scratch};

}  // namespace mnp::cpu
