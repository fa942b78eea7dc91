#include <algorithm>
#include <cstddef>

#include "cpu/dispatch.h"
#include "ops.h"

namespace mnp::ops {
namespace {

// The width of a row as a matrix of channels and taps, or of taps and channels: singular values are
// the same. 0 where the row's memory is neither.
int64_t matrix_columns(const Tensor& weight) {
  const int64_t channels = weight.dim() > 1 ? weight.size(1) : 1;
  int64_t taps = 1;
  bool channels_first = true, channels_last = true;
  for (int64_t i = weight.dim() - 1; i > 1; --i) {
    if (weight.size(i) != 1) {
      channels_first &= weight.stride(i) == taps;
      channels_last &= weight.stride(i) == taps * channels;
    }
    taps *= weight.size(i);
  }
  if (channels != 1) {
    channels_first &= weight.stride(1) == taps;
    channels_last &= weight.stride(1) == 1;
  }
  return channels_first ? taps : channels_last ? channels : 0;
}

// Fills in all layers' norms in one parallel loop over their elements, as layers differ in size.
void run_magnitude(const std::vector<cpu::NeuronRows>& layers,
                   const std::vector<int64_t>& neurons) {
  int64_t total = 0;
  for (size_t i = 0; i < layers.size(); ++i) total += neurons[i] * layers[i].size;
  int64_t scratch_size = 0;
  for (const cpu::NeuronRows& layer : layers)
    scratch_size = std::max(scratch_size, cpu::kernels().magnitude_scratch(layer));
  torch::stable::parallel_for(0, total, grain(1), [&](int64_t begin, int64_t end) {
    std::vector<std::max_align_t> scratch(scratch_size / sizeof(std::max_align_t) + 1);
    int64_t start = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      const int64_t size = layers[i].size;
      // A row belongs to the range that its first element is in.
      const auto row_at = [&](int64_t element) {
        return std::clamp<int64_t>((element - start + size - 1) / size, 0, neurons[i]);
      };
      const int64_t first = row_at(begin), last = row_at(end);
      if (first < last) cpu::kernels().magnitude(layers[i], first, last, scratch.data());
      start += neurons[i] * size;
    }
  });
}

}  // namespace

std::vector<Tensor> neuron_magnitude(const std::vector<Tensor>& weights, const std::string& norm) {
  const char* op = "neuron_magnitude";
  const Norm kind = parse_norm(op, norm);
  const bool spectral = kind == Norm::spectral;
  for (const Tensor& w : weights)
    MNP_CHECK(w.is_cpu() && w.dim() >= 1, op,
              ": weights must be CPU tensors of shape (neurons, *), not ", shape_of(w));
  std::vector<Tensor> dense, norms;
  std::vector<cpu::NeuronRows> layers;
  std::vector<int64_t> neurons;
  for (const Tensor& given : weights) {
    const ScalarType type = compute_type(op, given);
    if (given.numel() == 0) {
      norms.push_back(torch::stable::full({given.size(0)}, 0, type));
      continue;
    }
    MNP_CHECK(!spectral || type == given.scalar_type(), op,
              ": 'spectral' takes float32 or float64 weights");
    const bool in_place = spectral ? matrix_columns(given) > 0 : has_dense_rows(given);
    dense.push_back(in_place ? given : to_contiguous(given));
    const Tensor& w = dense.back();
    norms.push_back(torch::stable::empty({w.size(0)}, type));
    neurons.push_back(w.size(0));
    layers.push_back({w.const_data_ptr(), element_of(w.scalar_type()), w.numel() / w.size(0),
                      w.stride(0), kind, norms.back().mutable_data_ptr(),
                      spectral ? matrix_columns(w) : 0});
  }
  run_magnitude(layers, neurons);
  return norms;
}

}  // namespace mnp::ops
