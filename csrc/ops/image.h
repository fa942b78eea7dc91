// What operators return. Its memory is kept for the next one, as that of workspace.h, where torch
// (from 2.11 on) can say when it is no longer used.
#pragma once

#include "tensors.h"

namespace mnp::ops {

// An uninitialized contiguous tensor on the CPU.
Tensor empty(const Ints& sizes, ScalarType type);

// An uninitialized channels-last image (N, C, H, W).
Tensor empty_image(const Ints& sizes, ScalarType type);

// An image on the CPU in this layout, transposed by a kernel; itself where it has it already.
Tensor channels_last_image(const Tensor& t);
Tensor contiguous_image(const Tensor& t);

// An uninitialized tensor of the sizes, strides and type of one whose elements lie without gaps.
Tensor empty_as(const Tensor& dense);

}  // namespace mnp::ops
