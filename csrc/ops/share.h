// Loops whose threads help each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "ops.h"

namespace mnp::ops {

// Set while a thread computes something by itself, beside others that do the same.
inline thread_local bool is_alone = false;

// How many threads a loop can have.
inline int64_t threads() { return is_alone ? 1 : torch::stable::get_num_threads(); }

// Calls f(i) for every i < count, each in one thread, in which all loops run; with one, as it is.
template <class F>
void each_alone(int64_t count, const F& f) {
  if (count == 1) return f(int64_t{0});
  std::exception_ptr error;
  std::mutex lock;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const bool before = std::exchange(is_alone, true);
    for (int64_t i = begin; i < end; ++i) try {
        f(i);
      } catch (...) {
        const std::lock_guard guard(lock);
        error = std::current_exception();
      }
    is_alone = before;
  });
  if (error) std::rethrow_exception(error);
}

// Items of a range, so that each thread has a few of them: a multiple of `unit`, if that is not 0.
inline int64_t range_of(int64_t count, int64_t unit) {
  constexpr int64_t kRanges = 16;
  const int64_t each = count / (threads() * kRanges);
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
  const int64_t used = std::min({threads(), ranges, (count + grain - 1) / grain});
  if (used <= 1) {
    if (count > 0) start()(int64_t{0}, count);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(used);
  for (int64_t t = 0; t < used; ++t)
    shares[t].next = t * ranges / used, shares[t].end = (t + 1) * ranges / used;
  torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      auto work = start();
      for (int64_t i = 0; i < used; ++i) {
        Share& share = shares[(t + i) % used];
        for (int64_t r; (r = share.next++) < share.end;)
          work(r * range, std::min(count, (r + 1) * range));
      }
    }
  });
}

}  // namespace mnp::ops
