#include "block.h"

#include <cmath>

#include "image.h"

namespace mnp::ops {
namespace {

// Vectors that may be missing.
template <class T>
struct Values {
  const T *conv_bias, *norm_weight, *norm_bias, *mean, *var;
  T eps;
  explicit Values(const Neurons& n)
      : conv_bias(data_or_null<T>(n.conv_bias)),
        norm_weight(data_or_null<T>(n.norm_weight)),
        norm_bias(data_or_null<T>(n.norm_bias)),
        mean(data_or_null<T>(n.mean)),
        var(data_or_null<T>(n.var)),
        eps(static_cast<T>(n.eps)) {}
  T inverse_deviation(int64_t k) const { return var ? 1 / std::sqrt(var[k] + eps) : T(1); }
  T scale(int64_t k) const { return inverse_deviation(k) * (norm_weight ? norm_weight[k] : T(1)); }
};

// Sums over the batch, a value a neuron.
struct BatchSums {
  std::vector<double> dz, masked_dz, dz_t, masked_dz_u;

  template <class T>
  BatchSums(const T* sums, int64_t batch, int64_t neurons, const T* mask, int64_t mask_stride)
      : dz(neurons), masked_dz(neurons), dz_t(neurons), masked_dz_u(neurons) {
    const int64_t next = batch * neurons;
    for (int64_t n = 0; n < batch; ++n, sums += neurons, mask += mask_stride)
      for (int64_t k = 0; k < neurons; ++k) {
        dz[k] += sums[k];
        masked_dz[k] += double(mask[k]) * sums[k];
        dz_t[k] += sums[next + k];
        masked_dz_u[k] += double(mask[k]) * sums[2 * next + k];
      }
  }
  const std::vector<double>& of_addend(bool is_masked) const { return is_masked ? masked_dz : dz; }
};

template <class T, class F>
Tensor vector_of(int64_t count, ScalarType type, const F& value) {
  Tensor vector = empty({count}, type);
  T* const values = mutable_data<T>(vector);
  for (int64_t k = 0; k < count; ++k) values[k] = static_cast<T>(value(k));
  return vector;
}

}  // namespace

void Neurons::prepare(const char* op, int64_t count, int64_t batch, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check_mask(op, mask, batch, count, x, type);
  mask = to_contiguous(mask);
  const auto each = [&](const char* name, MaybeTensor& vector) {
    if (!vector) return;
    check_vector(op, name, *vector, count, x, type);
    vector = to_contiguous(*vector);
  };
  each("the convolution's bias", conv_bias);
  each("the norm's weight", norm_weight);
  each("the norm's bias", norm_bias);
  each("running_mean", mean);
  each("running_var", var);
}

Terms Neurons::terms(int64_t count, ScalarType type) const {
  Terms terms{empty({count}, type), empty({count}, type), empty({count}, type)};
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Values<T> v(*this);
    T* const scale = mutable_data<T>(terms.scale);
    T* const shift = mutable_data<T>(terms.shift);
    T* const bias = mutable_data<T>(terms.bias);
    for (int64_t k = 0; k < count; ++k) {
      const T a = v.scale(k);
      scale[k] = a, shift[k] = bias[k] = 0;
      if (v.mean) (masks_mean ? shift : bias)[k] -= a * v.mean[k];
      if (v.norm_bias) (masks_norm_bias ? shift : bias)[k] += v.norm_bias[k];
      if (v.conv_bias) (masks_conv_bias ? shift : bias)[k] += a * v.conv_bias[k];
    }
  });
  return terms;
}

std::vector<Tensor> Neurons::grads(const Tensor& sums, const bool (&needed)[kVectors]) const {
  const int64_t batch = sums.size(1), count = sums.size(2);
  const bool per_sample = mask.dim() == 2;
  const ScalarType type = sums.scalar_type();
  std::vector<Tensor> grads(kVectors);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Values<T> v(*this);
    const T* const each = data<T>(sums);
    const BatchSums total(each, batch, count, data<T>(mask), per_sample ? count : 0);
    const auto& dz_mean = total.of_addend(masks_mean);
    const auto& dz_norm_bias = total.of_addend(masks_norm_bias);
    const auto& dz_conv_bias = total.of_addend(masks_conv_bias);
    if (needed[kMask] && per_sample) {
      grads[kMask] = empty({batch, count}, type);
      std::copy_n(each + batch * count, batch * count, mutable_data<T>(grads[kMask]));
    } else if (needed[kMask]) {
      grads[kMask] = vector_of<T>(count, type, [&](int64_t k) { return total.dz_t[k]; });
    }
    if (needed[kConvBias])
      grads[kConvBias] =
          vector_of<T>(count, type, [&](int64_t k) { return v.scale(k) * dz_conv_bias[k]; });
    if (needed[kNormWeight])
      grads[kNormWeight] = vector_of<T>(count, type, [&](int64_t k) {
        double scale = total.masked_dz_u[k];
        if (v.mean) scale -= v.mean[k] * dz_mean[k];
        if (v.conv_bias) scale += v.conv_bias[k] * dz_conv_bias[k];
        return v.inverse_deviation(k) * scale;
      });
    if (needed[kNormBias])
      grads[kNormBias] = vector_of<T>(count, type, [&](int64_t k) { return dz_norm_bias[k]; });
  });
  return grads;
}

}  // namespace mnp::ops
