#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <type_traits>

namespace mnp::cpu {

extern const KernelTable kernels_baseline;
#ifdef MNP_X86
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

namespace {

struct InstructionSet {
  const KernelTable* table;
  bool usable;
};

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets{{&kernels_baseline, true}};
#ifdef MNP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef MNP_EMULATE_AVX512
  const bool avx512 = avx2;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  sets.push_back({&kernels_avx2, avx2});
  sets.push_back({&kernels_avx512, avx512});
#endif
  return sets;
}

const KernelTable* choose() {
  const char* wanted = std::getenv("MNP_FAST_CPU");
  const KernelTable* best = nullptr;
  for (const InstructionSet& set : instruction_sets())
    if (set.usable && (!wanted || !*wanted || set.table->name == std::string(wanted)))
      best = set.table;
  if (best) return best;
  std::string names;
  for (const std::string& name : usable_instruction_sets()) names += " " + name;
  throw std::runtime_error("MNP_FAST_CPU is '" + std::string(wanted) +
                           "', but this CPU and build allow only:" + names);
}

template <class T>
const Kernels<T>& of_type(const KernelTable& table) {
  if constexpr (std::is_same_v<T, float>)
    return table.f32;
  else
    return table.f64;
}

}  // namespace

std::vector<std::string> built_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) names.push_back(set.table->name);
  return names;
}

std::vector<std::string> usable_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets())
    if (set.usable) names.push_back(set.table->name);
  return names;
}

const KernelTable& kernels() {
  static const KernelTable* table = choose();
  return *table;
}

template <class T>
const Kernels<T>& kernels_of() {
  return of_type<T>(kernels());
}

template <class T>
const Kernels<T>& kernels_of_group(int64_t channels) {
  const Kernels<T>& widest = kernels_of<T>();
#ifdef MNP_X86
  const int64_t lanes = widest.panel / 2;
  // Groups of one channel share vectors without moving lanes.
  if (&kernels() == &kernels_avx512 && channels > 1 && channels < lanes)
    return of_type<T>(kernels_avx2);
#endif
  return widest;
}

template const Kernels<float>& kernels_of();
template const Kernels<double>& kernels_of();
template const Kernels<float>& kernels_of_group(int64_t);
template const Kernels<double>& kernels_of_group(int64_t);

}  // namespace mnp::cpu
