// Images that operators return.
#pragma once

#include "tensors.h"

namespace mnp::ops {

// An uninitialized channels-last image (N, C, H, W). Its memory is kept for the next one, as that
// of workspace.h, where torch (from 2.11 on) can say when it is no longer used.
Tensor empty_image(const std::vector<int64_t>& sizes, ScalarType type);

}  // namespace mnp::ops
