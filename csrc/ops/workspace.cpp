#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <vector>

namespace mnp::ops {
namespace {

constexpr std::align_val_t kLine{64};
constexpr std::size_t kHeader = 64;    // holds the size, and keeps what follows aligned
constexpr std::size_t kSmall = 65536;  // below this the allocator needs no fresh pages

#ifdef __SANITIZE_ADDRESS__
std::atomic<int64_t> budget{0};  // what lies past the end of a kept block may be a part of it
#else
std::atomic<int64_t> budget{int64_t{256} << 20};
#endif

// Blocks that nobody uses. Its lock is only ever tried: a call that does not get it, as in a child
// forked while another thread held it, uses plain memory.
struct Pool {
  std::mutex lock;
  std::vector<char*> blocks;
  int64_t bytes = 0;
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: threads may outlive static objects
  return *pool;
}

std::size_t& size_of(char* block) { return *reinterpret_cast<std::size_t*>(block); }

void release(char* block) { ::operator delete(block, kLine); }

}  // namespace

void* take_memory(std::size_t bytes) {
  if (bytes >= kSmall) {
    Pool& p = pool();
    const std::unique_lock guard(p.lock, std::try_to_lock);
    if (guard) {
      auto best = p.blocks.end();
      for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it)
        if (size_of(*it) >= bytes && size_of(*it) <= bytes + bytes / 4 &&
            (best == p.blocks.end() || size_of(*it) < size_of(*best)))
          best = it;
      if (best != p.blocks.end()) {
        char* const block = *best;
        p.blocks.erase(best);
        p.bytes -= size_of(block);
        return block + kHeader;
      }
    }
  }
  char* const block = static_cast<char*>(::operator new(bytes + kHeader, kLine));
  size_of(block) = bytes;
  return block + kHeader;
}

void give_memory(void* memory) {
  if (!memory) return;
  char* const block = static_cast<char*>(memory) - kHeader;
  std::vector<char*> old;
  {
    Pool& p = pool();
    const std::unique_lock guard(p.lock, std::try_to_lock);
    const int64_t bytes = size_of(block);
    if (!guard || size_of(block) < kSmall || bytes > budget) {
      old.push_back(block);
    } else {
      // The oldest go first: shapes that are no longer used must not fill the budget.
      auto until = p.blocks.begin();
      for (; p.bytes + bytes > budget; ++until) p.bytes -= size_of(*until);
      old.assign(p.blocks.begin(), until);
      p.blocks.erase(p.blocks.begin(), until);
      p.blocks.push_back(block);
      p.bytes += bytes;
    }
  }
  std::for_each(old.begin(), old.end(), release);
}

void set_memory_budget(int64_t bytes) {
  budget = bytes;
  std::vector<char*> old;
  {
    Pool& p = pool();
    const std::unique_lock guard(p.lock, std::try_to_lock);
    if (guard) {
      old.swap(p.blocks);
      p.bytes = 0;
    }
  }
  std::for_each(old.begin(), old.end(), release);
}

int64_t memory_budget() { return budget; }

}  // namespace mnp::ops
