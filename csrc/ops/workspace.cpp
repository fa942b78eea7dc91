#include "workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <new>
#include <vector>

namespace mnp::ops {
namespace {

constexpr std::align_val_t kLine{64};
constexpr std::size_t kHeader = 64;  // of which a Header is a part; keeps what follows aligned
// Up to this the allocator needs no fresh pages.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeepsSmall = false;
constexpr std::size_t kSmall =
    SIZE_MAX;  // all from the allocator, which guards what lies past the end
#else
constexpr bool kKeepsSmall = true;
constexpr std::size_t kSmall = 65536;
#endif

std::atomic<int64_t> budget{int64_t{512} << 20};

// Blocks that nobody uses.
struct Pool {
  std::mutex lock;
  std::vector<char*> blocks;
  int64_t bytes = 0;
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: threads may outlive static objects
  return *pool;
}

struct Header {
  std::size_t size;
  const void* owner;  // the thread that took it last: in its core's caches is what it holds
};

std::size_t& size_of(char* block) { return reinterpret_cast<Header*>(block)->size; }
const void*& owner_of(char* block) { return reinterpret_cast<Header*>(block)->owner; }

const void* this_thread() {
  static thread_local const char token = 0;
  return &token;
}

// Large blocks are mapped: many of changing sizes, taken and given by several threads, would leave
// the allocator's heaps full of holes.
char* acquire(std::size_t bytes) {
  char* block;
  if (bytes <= kSmall) {
    block = static_cast<char*>(::operator new(bytes + kHeader, kLine));
  } else {
    void* const pages =
        mmap(nullptr, bytes + kHeader, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    block = static_cast<char*>(pages);
  }
  size_of(block) = bytes, owner_of(block) = this_thread();
  return block;
}

void release(char* block) {
  if (size_of(block) <= kSmall)
    ::operator delete(block, kLine);
  else
    munmap(block, size_of(block) + kHeader);
}

// Small blocks that a thread gave back, of sizes that are powers of two: the allocator would search
// its holes for aligned memory each time.
class SmallBlocks {
 public:
  ~SmallBlocks() {
    for (auto& blocks : kept_) std::for_each(blocks.begin(), blocks.end(), release);
    is_gone_ = true;
  }
  static char* take(std::size_t bytes) {
    const int power = std::bit_width(std::max<std::size_t>(bytes, 64) - 1);
    if (!is_gone_ && !mine_.kept_[power].empty()) {
      char* const block = mine_.kept_[power].back();
      mine_.kept_[power].pop_back();
      mine_.bytes_ -= size_of(block);
      return block;
    }
    return acquire(std::size_t{1} << power);
  }
  static void give(char* block) {
    if (is_gone_ || mine_.bytes_ + size_of(block) > kMost) return release(block);
    mine_.bytes_ += size_of(block);
    mine_.kept_[std::bit_width(size_of(block) - 1)].push_back(block);
  }

 private:
  static constexpr std::size_t kMost = std::size_t{1} << 20;
  static thread_local SmallBlocks mine_;
  static thread_local bool is_gone_;  // what is destroyed later still gives back
  std::vector<char*> kept_[std::bit_width(std::size_t{65536})];
  std::size_t bytes_ = 0;
};

thread_local SmallBlocks SmallBlocks::mine_;
thread_local bool SmallBlocks::is_gone_ = false;

}  // namespace

std::unique_lock<std::mutex> lock_soon(std::mutex& lock) {
  constexpr int kTries = 4096;
  std::unique_lock guard(lock, std::try_to_lock);
  for (int i = 0; i < kTries && !guard; ++i) guard.try_lock();
  return guard;
}

void* take_memory(std::size_t bytes) {
  if (bytes <= kSmall) {
    if (kKeepsSmall) return SmallBlocks::take(bytes) + kHeader;
  } else {
    Pool& p = pool();
    const auto guard = lock_soon(p.lock);
    if (guard) {
      // Another thread's would have to come out of another core's caches.
      const auto before = [](char* a, char* b) {
        const bool own = owner_of(a) == this_thread(), owned = owner_of(b) == this_thread();
        return own != owned ? own : size_of(a) < size_of(b);
      };
      auto best = p.blocks.end();
      for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it)
        if (size_of(*it) >= bytes && size_of(*it) <= bytes + bytes / 4 &&
            (best == p.blocks.end() || before(*it, *best)))
          best = it;
      if (best != p.blocks.end()) {
        char* const block = *best;
        p.blocks.erase(best);
        p.bytes -= size_of(block);
        owner_of(block) = this_thread();
        return block + kHeader;
      }
    }
  }
  return acquire(bytes) + kHeader;
}

void give_memory(void* memory) {
  if (!memory) return;
  char* const block = static_cast<char*>(memory) - kHeader;
  if (size_of(block) <= kSmall) return kKeepsSmall ? SmallBlocks::give(block) : release(block);
  std::vector<char*> old;
  {
    Pool& p = pool();
    const auto guard = lock_soon(p.lock);
    const int64_t bytes = size_of(block);
    if (!guard || bytes > budget) {
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
    const auto guard = lock_soon(p.lock);
    if (guard) {
      old.swap(p.blocks);
      p.bytes = 0;
    }
  }
  std::for_each(old.begin(), old.end(), release);
}

int64_t memory_budget() { return budget; }

}  // namespace mnp::ops
