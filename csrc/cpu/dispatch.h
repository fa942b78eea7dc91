// Chooses the kernels of the best instruction set that the CPU has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mnp::cpu {

// Instruction sets compiled in, and those of them that this CPU runs; worst first.
std::vector<std::string> built_instruction_sets();
std::vector<std::string> usable_instruction_sets();

// The set in use: the best usable one, or the one that the environment variable MNP_FAST_CPU names.
// Throws std::runtime_error where that names one that is not usable.
const KernelTable& kernels();

template <class T>
const Kernels<T>& kernels_of();

// The same for groups of so many channels: those of AVX2 where vectors of AVX-512 are not full.
template <class T>
const Kernels<T>& kernels_of_group(int64_t channels);

}  // namespace mnp::cpu
