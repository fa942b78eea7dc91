// Passes over images on torch's threads.
#pragma once

#include "cpu/dispatch.h"
#include "tensors.h"

namespace mnp::ops {

// y = act(mask * (scale * u + shift) + bias + residual); y may be u.
template <class T>
void run_epilogue(const NeuronLayout& layout, const cpu::Epilogue<T>& epilogue, const T* u, T* y);

// Runs cpu::Kernels::epilogue_grad over all samples and neurons on torch's threads.
template <class T>
void run_epilogue_grad(const cpu::EpilogueGrad<T>& a);

}  // namespace mnp::ops
