#include "packed.h"

#include <atomic>
#include <map>
#include <mutex>

#include "workspace.h"

namespace mnp::ops {
namespace {

struct Kept {
  std::shared_ptr<const void> memory;
  int64_t bytes;
};

struct Frozen {
  int64_t count = 0;
  std::map<std::vector<int64_t>, Kept> packed;
};

struct Table {
  std::mutex lock;
  std::atomic<int64_t> count{0};  // of addresses
  std::map<int64_t, Frozen> frozen;
  int64_t bytes = 0;
};

Table& table() {
  static Table* const table = new Table;  // never destroyed: threads may outlive static objects
  return *table;
}

void drop_packed(Frozen& frozen) {
  for (const auto& [kind, kept] : frozen.packed) table().bytes -= kept.bytes;
  frozen.packed.clear();
}

}  // namespace

void freeze_weights(int64_t address) {
  const std::lock_guard guard(table().lock);
  ++table().frozen[address].count;
  table().count = static_cast<int64_t>(table().frozen.size());
}

void thaw_weights(int64_t address) {
  const std::lock_guard guard(table().lock);
  const auto at = table().frozen.find(address);
  if (at == table().frozen.end() || --at->second.count > 0) return;
  drop_packed(at->second);
  table().frozen.erase(at);
  table().count = static_cast<int64_t>(table().frozen.size());
}

bool weights_are_frozen(int64_t address) {
  if (table().count == 0) return false;
  const auto guard = lock_soon(table().lock);
  return guard && table().frozen.count(address) > 0;
}

void forget_weights(int64_t address) {
  const std::lock_guard guard(table().lock);
  const auto at = table().frozen.find(address);
  if (at != table().frozen.end()) drop_packed(at->second);
}

template <class T>
std::shared_ptr<const T[]> kept_weights(const T* weights, const std::vector<int64_t>& kind,
                                        int64_t size, const std::function<void(T*)>& pack) {
  const int64_t address = reinterpret_cast<int64_t>(weights);
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  Table& t = table();
  if (t.count == 0) return nullptr;
  {
    const auto guard = lock_soon(t.lock);
    if (!guard) return nullptr;
    const auto at = t.frozen.find(address);
    if (at == t.frozen.end()) return nullptr;
    const auto kept = at->second.packed.find(kind);
    if (kept != at->second.packed.end())
      return std::static_pointer_cast<const T[]>(kept->second.memory);
    if (t.bytes + bytes > memory_budget()) return nullptr;
    t.bytes += bytes;
  }
  // Not under the lock: packing uses all threads.
  const std::shared_ptr<T[]> packed(buffer<T>(size).release(), GiveBack{});
  pack(packed.get());
  const std::lock_guard guard(t.lock);
  const auto at = t.frozen.find(address);
  // Thawed meanwhile, or packed by another thread as well.
  if (at == t.frozen.end() || !at->second.packed.insert({kind, {packed, bytes}}).second)
    t.bytes -= bytes;
  return packed;
}

template std::shared_ptr<const float[]> kept_weights(const float*, const std::vector<int64_t>&,
                                                     int64_t, const std::function<void(float*)>&);
template std::shared_ptr<const double[]> kept_weights(const double*, const std::vector<int64_t>&,
                                                      int64_t, const std::function<void(double*)>&);

}  // namespace mnp::ops
