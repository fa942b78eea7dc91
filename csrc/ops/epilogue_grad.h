#pragma once

#include "cpu/dispatch.h"
#include "tensors.h"

namespace mnp::ops {

// Runs cpu::Kernels::epilogue_grad over all samples and neurons on torch's threads.
template <class T>
void run_epilogue_grad(const cpu::EpilogueGrad<T>& a);

}  // namespace mnp::ops
