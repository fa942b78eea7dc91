// Packed weights that are kept while somebody watches that the weights do not change.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace mnp::ops {

// Says, or no longer says, that the memory at an address holds weights that do not change. Counted.
void freeze_weights(int64_t address);
void thaw_weights(int64_t address);

bool weights_are_frozen(int64_t address);

// They did change: what was packed of them is dropped.
void forget_weights(int64_t address);

// `size` packed elements of the weights at an address, made once for each `kind`, which says all of
// how they are read and packed; null where they are not frozen or more than the memory budget would
// be kept.
template <class T>
std::shared_ptr<const T[]> kept_weights(const T* weights, const std::vector<int64_t>& kind,
                                        int64_t size, const std::function<void(T*)>& pack);

}  // namespace mnp::ops
