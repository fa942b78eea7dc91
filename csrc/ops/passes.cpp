#include "passes.h"

#include <algorithm>

#include "share.h"

namespace mnp::ops {

template <class T>
void run_epilogue(const NeuronLayout& layout, const cpu::Epilogue<T>& epilogue, const T* u, T* y) {
  const int64_t rows = layout.batch * (layout.channels_last ? layout.inner : layout.neurons);
  const int64_t row_size = layout.channels_last ? layout.neurons : layout.inner;
  share_out(rows, grain(row_size), range_of(rows, 1), [&] {
    return [&](int64_t begin, int64_t end) {
      cpu::kernels_of<T>().epilogue_forward(layout, epilogue, u, y, begin, end);
    };
  });
}

template <class T>
void run_epilogue_grad(const cpu::EpilogueGrad<T>& a) {
  constexpr int64_t kNeurons = 64;
  const int64_t strips = (a.layout.neurons + kNeurons - 1) / kNeurons;
  share_out(a.layout.batch * strips, grain(a.layout.inner * kNeurons), 1, [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / strips, first = i % strips * kNeurons;
        cpu::kernels_of<T>().epilogue_grad(a, n, n + 1, first,
                                           std::min(first + kNeurons, a.layout.neurons));
      }
    };
  });
}

template void run_epilogue(const NeuronLayout&, const cpu::Epilogue<float>&, const float*, float*);
template void run_epilogue(const NeuronLayout&, const cpu::Epilogue<double>&, const double*,
                           double*);
template void run_epilogue_grad(const cpu::EpilogueGrad<float>&);
template void run_epilogue_grad(const cpu::EpilogueGrad<double>&);

}  // namespace mnp::ops
