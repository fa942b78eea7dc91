#include <algorithm>

#include "conv.h"
#include "cpu/caches.h"
#include "packed.h"
#include "share.h"

namespace mnp::ops {
namespace {

template <class T>
const cpu::WinogradKernels<T>& kernels_for(const cpu::Kernels<T>& all, const Conv& conv,
                                           Algorithm algorithm, bool transposed) {
  if (conv.kh == 5) return all.winograd2_of_5;
  const bool two = algorithm == Algorithm::winograd2;
  if (two && conv.is_two_by_two()) return all.winograd2_whole;
  if (conv.stride[0] == 1) return two ? all.winograd2 : all.winograd4;
  if (transposed) return two ? all.winograd2_stride2_grad : all.winograd4_stride2_grad;
  return two ? all.winograd2_stride2 : all.winograd4_stride2;
}

// The first group's part of the convolution, without its output.
template <class T>
cpu::Winograd<T> problem(const Conv& conv, const T* x) {
  cpu::Winograd<T> a{};
  a.input = x;
  a.batch = conv.n, a.in_h = conv.h, a.in_w = conv.w, a.in_stride = conv.c;
  a.in_depth = a.depth = conv.group_in();
  a.padding_h = conv.padding[0], a.padding_w = conv.padding[1];
  a.dilation_h = conv.dilation[0], a.dilation_w = conv.dilation[1];
  a.out_h = conv.oh, a.out_w = conv.ow, a.out_stride = conv.k, a.width = conv.group_out();
  return a;
}

// A group's part of a convolution that is given for the first group.
template <class T>
struct Part {
  cpu::Epilogue<T> epilogue;
  cpu::Winograd<T> problem;
  Part(const cpu::Winograd<T>& first, int64_t group)
      : epilogue(from_neuron(*first.epilogue, group * first.width)), problem(first) {
    problem.input += group * first.depth, problem.output += group * first.width;
    problem.epilogue = &epilogue;
  }
  Part(const Part&) = delete;
};

// Groups whose inputs are transformed together: those of one alone, a few bytes of each pixel,
// would be read far more slowly.
int64_t groups_together(const Conv& conv, int64_t depth) {
  constexpr int64_t kChannels = 128;
  return std::clamp<int64_t>(kChannels / depth, 1, conv.groups);
}

// What the transform of a tile's input costs for each channel, in multiply-adds.
constexpr int64_t kTransform = 256;

// Into how many blocks of at most `most` tiles: as many for each thread, if they do not get small.
int64_t blocks_of(int64_t tiles, int64_t most) {
  constexpr int64_t kSmall = 12;
  const int64_t count = threads(), fewest = (tiles + most - 1) / most;
  const int64_t even = (fewest + count - 1) / count * count;
  return tiles / even >= kSmall ? even : fewest;
}

// Runs `a`, which is the first group's, with the convolution's weights, for a gradient of the input
// turned and transposed.
template <class T>
void run_winograd(cpu::Winograd<T>& a, const Conv& conv, Algorithm algorithm, const Tensor& weight,
                  bool transposed) {
  const auto& all = conv.groups > 1 ? cpu::kernels_of_group<T>(a.width) : cpu::kernels_of<T>();
  const auto& kernels = kernels_for(all, conv, algorithm, transposed);
  const int64_t together = groups_together(conv, a.depth);
  const std::unique_ptr<T[]> zeros(new T[together * a.depth]());
  a.zeros = zeros.get();
  // Channels are multiplied in sets, of which each group of the convolution has so many.
  const int64_t tiles = kernels.tiles(a), sets = all.winograd_sets(a.width);
  if (tiles == 0) return;
  const int64_t set_size = kernels.set_size(a.depth), group_size = sets * set_size;
  const cpu::Weights<T> weights = weights_of<T>(weight, transposed);
  const int64_t stride_g = conv.group_out() * weight.stride(0);
  const auto pack = [&](int64_t set, T* packed) {
    cpu::Weights<T> part = weights;
    part.data += set / sets * stride_g;
    kernels.pack(part, transposed, a.depth, a.width, set % sets, packed);
  };
  const auto pack_all = [&](T* packed) {
    torch::stable::parallel_for(0, conv.groups * sets, grain(100 * a.depth),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t s = begin; s < end; ++s)
                                    pack(s, packed + s * set_size);
                                });
  };
  const auto kept = kept_weights<T>(
      weights.data,
      {static_cast<int64_t>(algorithm), conv.kh, conv.stride[0], set_size, transposed, conv.groups,
       a.depth, a.width, stride_g, weights.stride_j, weights.stride_q, weights.stride_d},
      conv.groups * group_size, pack_all);
  const int64_t tile_cost = 16 * a.depth * a.width;
  if (kernels.input_size(a.depth, tiles) <= group_size && conv.groups <= sets) {
    // Fewer inputs than weights: those are kept, and each set's weights are packed where used.
    // Products of a part may take twice the second cache: they are written and read once, but every
    // part reads all weights.
    const int64_t tile_bytes = kernels.product_size(1) * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, 2 * cpu::caches().l2 / tile_bytes);
    const int64_t parts = (tiles + most - 1) / most;
    const int64_t products = kernels.product_size((tiles + parts - 1) / parts);
    const auto inputs = buffer<T>(kernels.input_size(a.depth, tiles));
    for (int64_t g = 0; g < conv.groups; ++g) {
      const Part<T> of_group(a, g);
      const cpu::Winograd<T>& b = of_group.problem;
      share_out(tiles, grain(kTransform * a.depth), range_of(tiles, 1), [&] {
        return [&](int64_t begin, int64_t end) {
          kernels.input(b, begin, end, inputs.get(), begin, tiles);
        };
      });
      share_out(sets, grain(tile_cost * tiles / sets), 1, [&] {
        return [&, own = buffer<T>(kept ? 0 : set_size), scratch = buffer<T>(products)](
                   int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            const T* packed = kept ? kept.get() + g * group_size + s * set_size : own.get();
            if (!kept) pack(g * sets + s, own.get());
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t first = part * tiles / parts, last = (part + 1) * tiles / parts;
              kernels.output(b, first, last, inputs.get(), first, tiles, s, packed, scratch.get());
            }
          }
        };
      });
    }
    return;
  }
  const int64_t most = kernels.block(together * a.depth, cpu::caches().l2);
  const int64_t blocks = blocks_of(tiles, most), block = (tiles + blocks - 1) / blocks;
  const int64_t bundles = (conv.groups + together - 1) / together;
  // Where there are bundles for all threads, each packs the weights of its own.
  const bool each = !kept && bundles >= threads();
  const auto shared = buffer<T>(kept || each ? 0 : conv.groups * group_size);
  if (!kept && !each) pack_all(shared.get());
  share_out(bundles * blocks, grain(tile_cost * block * together), 1, [&] {
    return [&, own = buffer<T>(each ? together * group_size : 0),
            inputs = buffer<T>(kernels.input_size(together * a.depth, block)),
            scratch = buffer<T>(kernels.product_size(block)),
            own_bundle = int64_t(-1)](int64_t begin, int64_t end) mutable {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i % blocks, bundle = i / blocks, first_group = bundle * together;
        const int64_t groups = std::min(together, conv.groups - first_group);
        const int64_t first = b * tiles / blocks, last = (b + 1) * tiles / blocks;
        if (each && bundle != own_bundle)
          for (int64_t s = 0; s < groups * sets; ++s)
            pack(first_group * sets + s, own.get() + s * set_size);
        own_bundle = bundle;
        const T* const all_packed = kept ? kept.get() : shared.get();
        const T* const packed = each ? own.get() : all_packed + first_group * group_size;
        for (int64_t g = 0; g < groups; ++g) {
          Part<T> of_group(a, first_group + g);
          of_group.problem.in_depth = groups * a.depth;
          if (g == 0) kernels.input(of_group.problem, first, last, inputs.get(), 0, block);
          for (int64_t s = 0; s < sets; ++s)
            kernels.output(of_group.problem, first, last, inputs.get() + g * a.depth, 0, block, s,
                           packed + g * group_size + s * set_size, scratch.get());
        }
      }
    };
  });
}

}  // namespace

template <class T>
void winograd_forward(const Conv& conv, Algorithm algorithm, const Tensor& weight, const T* x,
                      const cpu::Epilogue<T>& epilogue, T* y) {
  cpu::Winograd<T> a = problem(conv, x);
  a.output = y;
  a.epilogue = &epilogue;
  run_winograd(a, conv, algorithm, weight, false);
}

// The gradient of the input is a convolution with the weights turned by 180 degrees.
template <class T>
void winograd_input_grad(const Conv& conv, Algorithm algorithm, const Tensor& weight, const T* g,
                         int64_t g_stride, const cpu::Epilogue<T>& epilogue, T* dx) {
  cpu::Winograd<T> a{};
  a.input = g;
  a.batch = conv.n, a.in_h = conv.oh, a.in_w = conv.ow, a.in_stride = g_stride;
  a.in_depth = a.depth = conv.group_out();
  const auto before = [&](int i) {
    return conv.stride[i] == 1 ? conv.dilation[i] * (conv.kh - 1) - conv.padding[i]
                               : (1 - conv.padding[i]) / 2;
  };
  a.padding_h = before(0), a.padding_w = before(1);
  a.dilation_h = conv.dilation[0], a.dilation_w = conv.dilation[1];
  a.output = dx;
  a.out_h = conv.h, a.out_w = conv.w, a.out_stride = conv.c, a.width = conv.group_in();
  a.epilogue = &epilogue;
  run_winograd(a, conv, algorithm, weight, true);
}

template <class T>
void winograd_weight_grad(const Conv& conv, Algorithm algorithm, const T* g, int64_t g_stride,
                          const T* x, T* dw) {
  const auto& all = cpu::kernels_of<T>();
  const auto& kernels = conv.stride[0] == 2                 ? all.winograd4_stride2_weight
                        : algorithm == Algorithm::winograd2 ? all.winograd2_weight
                                                            : all.winograd4_weight;
  cpu::WinogradWeightGrad<T> a{};
  a.conv = problem(conv, x);
  const std::unique_ptr<T[]> zeros(new T[std::max(conv.c, conv.k)]());
  a.conv.zeros = zeros.get();
  a.grad = g, a.grad_stride = g_stride, a.weight_grad = dw;
  const auto plan = a.plan = kernels.plan(a.conv, cpu::caches().l2);
  if (plan.tiles == 0) {
    std::fill_n(dw, conv.k * conv.c * conv.taps(), T(0));
    return;
  }
  const auto inputs = buffer<T>(plan.inputs), grads = buffer<T>(plan.grads);
  const auto transform = [&](int64_t first, int64_t last) {
    share_out(last - first, grain(kTransform * (conv.c + conv.k)), range_of(last - first, 1), [&] {
      return [&](int64_t begin, int64_t end) {
        kernels.tiles(a, first + begin, first + end, first, inputs.get(), grads.get());
      };
    });
  };
  const int64_t unit_cost = plan.chunk * plan.unit_size;
  if (plan.chunk == plan.tiles) {
    // All at once: a unit's sums become gradients while they are in cache.
    transform(0, plan.tiles);
    share_out(plan.units, grain(unit_cost), 1, [&] {
      return [&, sums = buffer<T>(plan.unit_size)](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
          kernels.sums(a, u, 0, plan.sums, plan.tiles, inputs.get(), grads.get(), sums.get(),
                       false);
          kernels.output(a, u, sums.get());
        }
      };
    });
    return;
  }
  const auto sums = buffer<T>(plan.units * plan.unit_size);
  for (int64_t first = 0; first < plan.tiles; first += plan.chunk) {
    const int64_t last = std::min(plan.tiles, first + plan.chunk);
    transform(first, last);
    share_out(plan.units * plan.sums, grain(unit_cost / plan.sums), 1, [&] {
      return [&](int64_t begin, int64_t end) {
        for (int64_t i = begin, next; i < end; i = next) {
          const int64_t unit = i / plan.sums, q = i % plan.sums;
          next = std::min(end, (unit + 1) * plan.sums);
          kernels.sums(a, unit, q, q + next - i, last - first, inputs.get(), grads.get(),
                       sums.get() + unit * plan.unit_size, first > 0);
        }
      };
    });
  }
  share_out(plan.units, grain(plan.unit_size), 1, [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) kernels.output(a, u, sums.get() + u * plan.unit_size);
    };
  });
}

template void winograd_forward(const Conv&, Algorithm, const Tensor&, const float*,
                               const cpu::Epilogue<float>&, float*);
template void winograd_input_grad(const Conv&, Algorithm, const Tensor&, const float*, int64_t,
                                  const cpu::Epilogue<float>&, float*);
template void winograd_weight_grad(const Conv&, Algorithm, const float*, int64_t, const float*,
                                   float*);
template void winograd_forward(const Conv&, Algorithm, const Tensor&, const double*,
                               const cpu::Epilogue<double>&, double*);
template void winograd_input_grad(const Conv&, Algorithm, const Tensor&, const double*, int64_t,
                                  const cpu::Epilogue<double>&, double*);
template void winograd_weight_grad(const Conv&, Algorithm, const double*, int64_t, const double*,
                                   double*);

}  // namespace mnp::ops
