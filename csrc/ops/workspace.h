// Memory of calls and of the tensors that they return. What is given back is kept for later calls,
// up to a budget, and up to 1 MiB of small blocks by each thread: fresh memory costs a page fault
// every 4 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace mnp::ops {

void* take_memory(std::size_t bytes);
void give_memory(void* memory);

// Bytes that are kept at most; memory beyond them is freed when it is given back.
void set_memory_budget(int64_t bytes);
int64_t memory_budget();

// A lock that is held for a moment only. A call that does not get it soon, as in a child forked
// while another thread held it, does without.
std::unique_lock<std::mutex> lock_soon(std::mutex& lock);

struct GiveBack {
  void operator()(void* memory) const { give_memory(memory); }
};

// Uninitialized memory, aligned to cache lines.
template <class T>
using Buffer = std::unique_ptr<T[], GiveBack>;

template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(take_memory(size * sizeof(T))));
}

}  // namespace mnp::ops
