// Loops whose threads help each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "ops.h"

namespace mnp::ops {

// Items of a range, so that each thread has a few of them: a multiple of `unit`, if that is not 0.
inline int64_t range_of(int64_t count, int64_t unit) {
  constexpr int64_t kRanges = 16;
  const int64_t each = count / (torch::stable::get_num_threads() * kRanges);
  const int64_t whole = std::max<int64_t>(1, unit);
  return std::max(whole, each / whole * whole);
}

// Computes items [0, count) in ranges of `range` of them, with at most a thread for each `grain`
// items. Each thread calls what start() returns, which has the thread's memory, with ranges: first
// those of its own share, which are the same in every call, then what is left of the others'. Cores
// are not equally fast, least of all those that something else runs on. A range is the same, and
// gives the same, whoever takes it.
template <class Start>
void share_out(int64_t count, int64_t grain, int64_t range, const Start& start) {
  const int64_t ranges = (count + range - 1) / range;
  const int64_t threads = std::min<int64_t>(
      std::min<int64_t>(torch::stable::get_num_threads(), ranges), (count + grain - 1) / grain);
  if (threads <= 1) {
    if (count > 0) start()(int64_t{0}, count);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t)
    shares[t].next = t * ranges / threads, shares[t].end = (t + 1) * ranges / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      auto work = start();
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(t + i) % threads];
        for (int64_t r; (r = share.next++) < share.end;)
          work(r * range, std::min(count, (r + 1) * range));
      }
    }
  });
}

}  // namespace mnp::ops
