#include "image.h"

#include "workspace.h"

// Of torch 2.11 and later; null where the torch that runs is older.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace mnp::ops {

Tensor empty_image(const std::vector<int64_t>& sizes, ScalarType type) {
  const int64_t pixels = sizes[0] * sizes[2] * sizes[3];
  if (!torch_from_blob || pixels * sizes[1] == 0)
    return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, std::nullopt,
                                std::nullopt, MemoryFormat::ChannelsLast);
  const int64_t strides[] = {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1], sizes[1]};
  const auto [element, dtype] =
      type == ScalarType::Double  ? std::pair(sizeof(double), aoti_torch_dtype_float64())
      : type == ScalarType::Float ? std::pair(sizeof(float), aoti_torch_dtype_float32())
                                  : std::pair(sizeof(uint8_t), aoti_torch_dtype_uint8());
  AtenTensorHandle handle = nullptr;
  void* const memory = take_memory(pixels * sizes[1] * element);
  const AOTITorchError failed = torch_from_blob(
      memory, 4, sizes.data(), strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { give_memory(data); },
      nullptr);
  if (failed) {
    give_memory(memory);
    fail("mnp_fast: torch cannot make an image of ", pixels, " pixels");
  }
  return Tensor(handle);
}

}  // namespace mnp::ops
