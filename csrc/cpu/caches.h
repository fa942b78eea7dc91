// The data caches of a core, from which kernels take the sizes of their blocks.
#pragma once

#include <stdint.h>

namespace mnp::cpu {

// Bytes. Where the system does not say: 32 KiB and 512 KiB.
struct Caches {
  int64_t l1, l2;
};

const Caches& caches();

}  // namespace mnp::cpu
