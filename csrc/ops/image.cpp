#include "image.h"

#include <utility>

#include "cpu/dispatch.h"
#include "ops.h"
#include "workspace.h"

// Of torch 2.11 and later; null where the torch that runs is older.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace mnp::ops {
namespace {

// A tensor whose elements lie at these strides, without gaps; torch_from_blob is there.
Tensor in_kept_memory(const Ints& sizes, const Ints& strides, ScalarType type) {
  const auto [element, dtype] =
      type == ScalarType::Double  ? std::pair(sizeof(double), aoti_torch_dtype_float64())
      : type == ScalarType::Float ? std::pair(sizeof(float), aoti_torch_dtype_float32())
                                  : std::pair(sizeof(uint8_t), aoti_torch_dtype_uint8());
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  AtenTensorHandle handle = nullptr;
  void* const memory = take_memory(elements * element);
  const AOTITorchError failed = torch_from_blob(
      memory, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { give_memory(data); }, nullptr);
  if (failed) {
    give_memory(memory);
    fail("mnp_fast: torch cannot make a tensor of ", elements, " elements");
  }
  return Tensor(handle);
}

// Whether it has channels and pixels to change places, of a type that the kernels know.
bool is_matrices(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return t.dim() == 4 && t.size(1) > 1 && t.size(2) * t.size(3) > 1 && t.numel() > 0 &&
         (type == ScalarType::Float || type == ScalarType::Double);
}

// [batch][rows][cols] as [batch][cols][rows].
void transpose(const Tensor& from, int64_t rows, int64_t cols, const Tensor& to) {
  with_type(from.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = cpu::kernels_of<T>();
    const cpu::Transpose<T> a{data<T>(from), mutable_data<T>(to), from.size(0), rows, cols};
    torch::stable::parallel_for(
        0, kernels.transpose_strips(a), grain(8 * cols),
        [&](int64_t begin, int64_t end) { kernels.transpose(a, begin, end); });
  });
}

}  // namespace

Tensor channels_last_image(const Tensor& t) {
  if (!is_matrices(t) || !t.is_contiguous()) return to_channels_last(t);
  const Tensor image = empty_image(sizes_of(t), t.scalar_type());
  transpose(t, t.size(1), t.size(2) * t.size(3), image);
  return image;
}

Tensor contiguous_image(const Tensor& t) {
  if (!is_matrices(t) || t.is_contiguous() || !is_channels_last(t)) return to_contiguous(t);
  const Tensor image = empty(sizes_of(t), t.scalar_type());
  transpose(t, t.size(2) * t.size(3), t.size(1), image);
  return image;
}

Tensor empty(const Ints& sizes, ScalarType type) {
  Ints strides(sizes.size(), 1);
  int64_t elements = 1;
  for (size_t i = sizes.size(); i-- > 0; elements *= sizes[i]) strides[i] = elements;
  if (!torch_from_blob) return torch::stable::empty({sizes.data(), sizes.size()}, type);
  return in_kept_memory(sizes, strides, type);
}

Tensor empty_image(const Ints& sizes, ScalarType type) {
  const int64_t row = sizes[3] * sizes[1], image = sizes[2] * row;
  if (!torch_from_blob || sizes[0] * image == 0)
    return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, std::nullopt,
                                std::nullopt, MemoryFormat::ChannelsLast);
  return in_kept_memory(sizes, {image, 1, row, sizes[1]}, type);
}

Tensor empty_as(const Tensor& dense) {
  if (!torch_from_blob || dense.numel() == 0) return torch::stable::empty_like(dense);
  const auto strides = dense.strides();
  return in_kept_memory(sizes_of(dense), {strides.begin(), strides.end()}, dense.scalar_type());
}

}  // namespace mnp::ops
