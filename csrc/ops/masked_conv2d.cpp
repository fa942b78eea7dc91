#include <algorithm>
#include <memory>
#include <new>

#include "ops.h"

namespace mnp::ops {
namespace {

// A convolution's geometry, checked.
struct Conv {
  int64_t n, c, h, w, k, kh, kw, oh, ow, groups;
  int64_t stride[2], padding[2], dilation[2];

  Conv(const char* op, const Tensor& x, const Tensor& weight, const Ints& s, const Ints& p,
       const Ints& d, int64_t g)
      : groups(g) {
    MNP_CHECK(x.is_cpu() && weight.is_cpu(), op, ": x and weight must be on the CPU");
    MNP_CHECK(x.dim() == 4, op, ": x must have shape (N, C, H, W), not ", shape_of(x));
    MNP_CHECK(weight.dim() == 4 && weight.numel() > 0, op,
              ": weight must have shape (K, C / groups, kh, kw), none of them 0, not ",
              shape_of(weight));
    MNP_CHECK(x.scalar_type() == weight.scalar_type(), op, ": x and weight must share a dtype");
    MNP_CHECK(s.size() == 2 && s[0] > 0 && s[1] > 0, op, ": stride must be two positive integers");
    MNP_CHECK(d.size() == 2 && d[0] > 0 && d[1] > 0, op,
              ": dilation must be two positive integers");
    MNP_CHECK(p.size() == 2 && p[0] >= 0 && p[1] >= 0, op,
              ": padding must be two non-negative integers");
    n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    k = weight.size(0), kh = weight.size(2), kw = weight.size(3);
    MNP_CHECK(g > 0 && k % g == 0 && c == weight.size(1) * g, op, ": x has ", c,
              " channels and weight has shape ", shape_of(weight),
              ", which do not fit groups = ", g);
    for (int i = 0; i < 2; ++i) stride[i] = s[i], padding[i] = p[i], dilation[i] = d[i];
    oh = (h + 2 * p[0] - d[0] * (kh - 1) - 1) / s[0] + 1;
    ow = (w + 2 * p[1] - d[1] * (kw - 1) - 1) / s[1] + 1;
    MNP_CHECK(h + 2 * p[0] > d[0] * (kh - 1) && w + 2 * p[1] > d[1] * (kw - 1), op,
              ": a kernel of ", kh, "x", kw, " with dilation ", d[0], "x", d[1],
              " does not fit a padded input of ", h + 2 * p[0], "x", w + 2 * p[1]);
  }
  int64_t taps() const { return kh * kw; }
  int64_t group_in() const { return c / groups; }
  int64_t group_out() const { return k / groups; }
};

// Which taps a gather uses, and where they read.
struct Taps {
  std::vector<int64_t> index, h, w;
};

Taps forward_taps(const Conv& conv) {
  Taps taps;
  for (int64_t i = 0; i < conv.kh; ++i)
    for (int64_t j = 0; j < conv.kw; ++j) {
      taps.index.push_back(i * conv.kw + j);
      taps.h.push_back(i * conv.dilation[0] - conv.padding[0]);
      taps.w.push_back(j * conv.dilation[1] - conv.padding[1]);
    }
  return taps;
}

// Input pixels with row % stride = phase meet only the taps whose output row is whole.
Taps phase_taps(const Conv& conv, int64_t phase_h, int64_t phase_w) {
  Taps taps;
  for (int64_t i = 0; i < conv.kh; ++i)
    for (int64_t j = 0; j < conv.kw; ++j) {
      const int64_t h = phase_h + conv.padding[0] - i * conv.dilation[0];
      const int64_t w = phase_w + conv.padding[1] - j * conv.dilation[1];
      if (h % conv.stride[0] || w % conv.stride[1]) continue;
      taps.index.push_back(i * conv.kw + j);
      taps.h.push_back(h / conv.stride[0]);
      taps.w.push_back(w / conv.stride[1]);
    }
  return taps;
}

// The weight with taps at one stride, which contiguous and channels-last weights have as they are.
Tensor even_taps(const Tensor& weight) {
  const bool even = weight.size(2) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  return even ? weight : torch::stable::contiguous(weight);
}

constexpr std::align_val_t kLine{64};

struct Free {
  void operator()(void* p) const { ::operator delete(p, kLine); }
};

// Uninitialized memory, aligned to cache lines.
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new(size * sizeof(T), kLine)));
}

// Whether Winograd's F(4x4, 3x3) is to compute an image of rows x cols: where it was no slower,
// measured with one thread on AVX2.
bool use_winograd(const char* op, const Conv& conv, const std::string& algorithm, ScalarType type,
                  int64_t rows, int64_t cols) {
  MNP_CHECK(algorithm == "auto" || algorithm == "direct" || algorithm == "winograd4", op,
            ": algorithm must be 'auto', 'direct' or 'winograd4', not '", algorithm, "'");
  const auto both = [](const int64_t* v, int64_t value) { return v[0] == value && v[1] == value; };
  const bool possible = conv.kh == 3 && conv.kw == 3 && both(conv.stride, 1) &&
                        both(conv.dilation, 1) && conv.groups == 1;
  MNP_CHECK(
      possible || algorithm != "winograd4", op,
      ": algorithm 'winograd4' needs a 3x3 kernel with stride 1, dilation 1 and groups 1, not ",
      conv.kh, "x", conv.kw, ", stride ", conv.stride[0], "x", conv.stride[1], ", dilation ",
      conv.dilation[0], "x", conv.dilation[1], " and groups ", conv.groups);
  if (algorithm != "auto") return algorithm == "winograd4";
  const int64_t tiles = conv.n * ((rows + 3) / 4) * ((cols + 3) / 4);
  return possible && type == ScalarType::Float && conv.c >= 16 && conv.k >= 16 && tiles >= 8 &&
         conv.n * rows * cols >= 10 * tiles;
}

// Runs `a` with the convolution's weights, for a gradient of the input turned and transposed.
template <class T>
void run_winograd(cpu::Winograd<T>& a, const Tensor& weight, bool transposed) {
  const auto& kernels = cpu::kernels_of<T>();
  const std::unique_ptr<T[]> zeros(new T[a.depth]());
  a.zeros = zeros.get();
  const int64_t tiles = kernels.winograd_tiles(a), groups = kernels.winograd_groups(a.width);
  if (tiles == 0) return;
  const int64_t group_size = kernels.winograd_group_size(a.depth);
  const auto pack = [&](int64_t group, T* packed) {
    kernels.winograd_pack(data<T>(weight), weight.stride(transposed), weight.stride(3),
                          weight.stride(!transposed), transposed, a.depth, a.width, group, packed);
  };
  const int64_t block = std::min(tiles, kernels.winograd_block(a.depth));
  const int64_t blocks = (tiles + block - 1) / block;
  const int64_t tile_cost = 36 * a.depth * a.width;
  const int64_t products = kernels.winograd_product_size(block);
  if (tiles <= a.width) {
    // Fewer inputs than weights: those are kept, and each group's weights are packed where used.
    const auto inputs = buffer<T>(kernels.winograd_input_size(a.depth, tiles));
    torch::stable::parallel_for(0, tiles, grain(36 * a.depth), [&](int64_t begin, int64_t end) {
      kernels.winograd_input(a, begin, end, inputs.get(), begin, tiles);
    });
    torch::stable::parallel_for(
        0, groups, grain(tile_cost * tiles / groups), [&](int64_t begin, int64_t end) {
          const auto packed = buffer<T>(group_size), scratch = buffer<T>(products);
          for (int64_t g = begin; g < end; ++g) {
            pack(g, packed.get());
            for (int64_t t = 0; t < tiles; t += block)
              kernels.winograd_output(a, t, std::min(tiles, t + block), inputs.get(), t, tiles, g,
                                      packed.get(), scratch.get());
          }
        });
    return;
  }
  const auto packed = buffer<T>(groups * group_size);
  torch::stable::parallel_for(0, groups, grain(100 * a.depth), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) pack(g, packed.get() + g * group_size);
  });
  torch::stable::parallel_for(0, blocks, grain(tile_cost * block), [&](int64_t begin, int64_t end) {
    const auto inputs = buffer<T>(kernels.winograd_input_size(a.depth, block));
    const auto scratch = buffer<T>(products);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, last = std::min(tiles, first + block);
      kernels.winograd_input(a, first, last, inputs.get(), 0, block);
      for (int64_t g = 0; g < groups; ++g)
        kernels.winograd_output(a, first, last, inputs.get(), 0, block, g,
                                packed.get() + g * group_size, scratch.get());
    }
  });
}

// Packs the weights of all groups; `transposed` swaps the roles of input and output channels.
template <class T>
Buffer<T> pack(const Conv& conv, const Tensor& weight, const Taps& taps, bool transposed) {
  const auto& kernels = cpu::kernels_of<T>();
  const int64_t count = static_cast<int64_t>(taps.index.size());
  const int64_t depth = transposed ? conv.group_out() : conv.group_in();
  const int64_t width = transposed ? conv.group_in() : conv.group_out();
  const int64_t size = kernels.panels_size(count, depth, width);
  const int64_t stride_k = weight.stride(0), stride_c = weight.stride(1);
  const int64_t stride_tap = conv.kw > 1 ? weight.stride(3) : weight.stride(2);
  auto panels = buffer<T>(size * conv.groups);
  const int64_t parts = kernels.panels_count(width);
  torch::stable::parallel_for(0, conv.groups * parts, grain(size / std::max<int64_t>(1, parts)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t g = i / parts, p = i % parts;
                                  kernels.pack_panels(
                                      data<T>(weight) + g * conv.group_out() * stride_k,
                                      transposed ? stride_c : stride_k, stride_tap,
                                      transposed ? stride_k : stride_c, taps.index.data(), count,
                                      depth, width, p, p + 1, panels.get() + g * size);
                                }
                              });
  return panels;
}

template <class T>
void run_gather(cpu::GatherGemm<T>& a, int64_t batch, const Taps& taps) {
  const auto& kernels = cpu::kernels_of<T>();
  std::unique_ptr<T[]> zeros(new T[a.depth]());
  a.zeros = zeros.get();
  a.taps = static_cast<int64_t>(taps.index.size());
  a.tap_h = taps.h.data();
  a.tap_w = taps.w.data();
  torch::stable::parallel_for(0, batch * a.rows * a.cols,
                              grain(a.taps * a.depth * a.width * a.groups),
                              [&](int64_t begin, int64_t end) {
                                auto scratch = buffer<const T*>(kernels.gather_scratch(a.taps));
                                kernels.gather_gemm(a, begin, end, scratch.get());
                              });
}

template <class T>
void input_grad(const Conv& conv, const Tensor& weight, const T* g, T* dx) {
  for (int64_t phase_h = 0; phase_h < std::min(conv.stride[0], conv.h); ++phase_h)
    for (int64_t phase_w = 0; phase_w < std::min(conv.stride[1], conv.w); ++phase_w) {
      const Taps taps = phase_taps(conv, phase_h, phase_w);
      const auto panels = pack<T>(conv, weight, taps, true);
      cpu::GatherGemm<T> a{};
      a.input = g;
      a.in_h = conv.oh, a.in_w = conv.ow, a.in_channels = conv.k;
      a.groups = conv.groups, a.depth = conv.group_out(), a.width = conv.group_in();
      a.panels = panels.get();
      a.rows = (conv.h - phase_h + conv.stride[0] - 1) / conv.stride[0];
      a.cols = (conv.w - phase_w + conv.stride[1] - 1) / conv.stride[1];
      a.step_h = a.step_w = 1;
      a.output = dx;
      a.out_h = conv.h, a.out_w = conv.w;
      a.out_step_h = conv.stride[0], a.out_step_w = conv.stride[1];
      a.out_origin_h = phase_h, a.out_origin_w = phase_w;
      run_gather(a, conv.n, taps);
    }
}

// The gradient of the input is a convolution with the weights turned by 180 degrees.
template <class T>
void winograd_input_grad(const Conv& conv, const Tensor& weight, const T* g, T* dx) {
  cpu::Winograd<T> a{};
  a.input = g;
  a.batch = conv.n, a.in_h = conv.oh, a.in_w = conv.ow, a.depth = conv.k;
  a.padding_h = 2 - conv.padding[0], a.padding_w = 2 - conv.padding[1];
  a.output = dx;
  a.out_h = conv.h, a.out_w = conv.w, a.width = conv.c;
  run_winograd(a, weight, true);
}

template <class T>
void weight_grad(const Conv& conv, const T* g, const T* x, T* dw) {
  const auto& kernels = cpu::kernels_of<T>();
  const Taps taps = forward_taps(conv);
  cpu::WeightGrad<T> a{};
  a.grad = g, a.input = x, a.weight_grad = dw;
  a.batch = conv.n, a.rows = conv.oh, a.cols = conv.ow;
  a.in_h = conv.h, a.in_w = conv.w, a.in_channels = conv.c;
  a.groups = conv.groups, a.depth = conv.group_in(), a.width = conv.group_out();
  a.taps = conv.taps(), a.tap_h = taps.h.data(), a.tap_w = taps.w.data();
  a.step_h = conv.stride[0], a.step_w = conv.stride[1];
  const int64_t units = kernels.weight_grad_units(a);
  torch::stable::parallel_for(0, units, grain(conv.n * conv.oh * conv.ow * a.depth),
                              [&](int64_t begin, int64_t end) {
                                auto scratch = buffer<T>(kernels.weight_grad_scratch(a));
                                kernels.weight_grad(a, begin, end, scratch.get());
                              });
}

Tensor to_channels_last(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(as_type(t, type), MemoryFormat::ChannelsLast);
}

// `t` in the input's dtype and memory format.
Tensor as_given(const Tensor& t, const Tensor& input) {
  const Tensor typed = as_type(t, input.scalar_type());
  return is_channels_last(input) ? typed : torch::stable::contiguous(typed);
}

Tensor empty(const Ints& sizes, ScalarType type, bool channels_last = false) {
  return torch::stable::empty(
      {sizes.data(), sizes.size()}, type, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace

std::tuple<Tensor, Tensor> masked_conv2d(const Tensor& x, const Tensor& weight,
                                         const MaybeTensor& mask, const MaybeTensor& scale,
                                         const MaybeTensor& shift, const MaybeTensor& bias,
                                         const MaybeTensor& residual, const Ints& stride,
                                         const Ints& padding, const Ints& dilation, int64_t groups,
                                         const std::string& activation, bool keep_u,
                                         const std::string& algorithm) {
  const char* op = "masked_conv2d";
  const ScalarType type = compute_type(op, x);
  const Conv conv(op, x, weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, x, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, x, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, x, type);
  const Tensor b = neuron_vector(op, "bias", bias, conv.k, 0, x, type);
  const bool relu = parse_activation(op, activation);
  const bool winograd = use_winograd(op, conv, algorithm, type, conv.oh, conv.ow);

  const Ints sizes{conv.n, conv.k, conv.oh, conv.ow};
  Tensor y = empty(sizes, type, true);
  Tensor u = keep_u ? empty(sizes, type, true) : empty({0}, type);
  MaybeTensor r;
  if (residual) {
    MNP_CHECK(residual->dim() == 4 && residual->size(0) == conv.n && residual->size(1) == conv.k &&
                  residual->size(2) == conv.oh && residual->size(3) == conv.ow,
              op, ": residual must have the output's shape ", shape_of(y), ", not ",
              shape_of(*residual));
    MNP_CHECK(residual->is_cpu() && residual->scalar_type() == x.scalar_type(), op,
              ": residual must have the input's dtype and device");
    r = to_channels_last(*residual, type);
  }
  const Tensor input = to_channels_last(x, type);
  const Tensor kernel = even_taps(as_type(weight, type));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Epilogue<T> epilogue{data<T>(m.values),
                                    m.stride,
                                    data<T>(a),
                                    data<T>(c),
                                    data<T>(b),
                                    data_or_null<T>(r),
                                    keep_u ? mutable_data<T>(u) : nullptr,
                                    relu};
    if (winograd) {
      cpu::Winograd<T> g{};
      g.input = data<T>(input);
      g.batch = conv.n, g.in_h = conv.h, g.in_w = conv.w, g.depth = conv.c;
      g.padding_h = conv.padding[0], g.padding_w = conv.padding[1];
      g.output = mutable_data<T>(y);
      g.out_h = conv.oh, g.out_w = conv.ow, g.width = conv.k;
      g.epilogue = &epilogue;
      run_winograd(g, kernel, false);
      return;
    }
    const Taps taps = forward_taps(conv);
    const auto panels = pack<T>(conv, kernel, taps, false);
    cpu::GatherGemm<T> g{};
    g.input = data<T>(input);
    g.in_h = conv.h, g.in_w = conv.w, g.in_channels = conv.c;
    g.groups = groups, g.depth = conv.group_in(), g.width = conv.group_out();
    g.panels = panels.get();
    g.rows = g.out_h = conv.oh, g.cols = g.out_w = conv.ow;
    g.step_h = conv.stride[0], g.step_w = conv.stride[1];
    g.output = mutable_data<T>(y);
    g.out_step_h = g.out_step_w = 1;
    g.epilogue = &epilogue;
    run_gather(g, conv.n, taps);
  });
  return {as_given(y, x), u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& y,
    const MaybeTensor& u, const MaybeTensor& mask, const MaybeTensor& scale,
    const MaybeTensor& shift, const Ints& stride, const Ints& padding, const Ints& dilation,
    int64_t groups, bool need_x, bool need_weight, bool need_residual, bool need_sums,
    const std::string& algorithm) {
  const char* op = "masked_conv2d_backward";
  const ScalarType type = compute_type(op, x);
  const Conv conv(op, x, weight, stride, padding, dilation, groups);
  const Mask m(op, mask, conv.n, conv.k, x, type);
  const Tensor a = neuron_vector(op, "scale", scale, conv.k, 1, x, type);
  const Tensor c = neuron_vector(op, "shift", shift, conv.k, 0, x, type);
  const bool winograd = use_winograd(op, conv, algorithm, type, conv.h, conv.w);
  MNP_CHECK(grad.dim() == 4 && grad.size(0) == conv.n && grad.size(1) == conv.k &&
                grad.size(2) == conv.oh && grad.size(3) == conv.ow,
            op, ": grad must have the output's shape, not ", shape_of(grad));
  MNP_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type(), op,
            ": grad must have the input's dtype and device");
  if (y) check_like(op, "y", *y, grad);
  MNP_CHECK(!u || (u->is_cpu() && u->scalar_type() == type && u->numel() == grad.numel()), op,
            ": u must be what masked_conv2d kept");

  const Tensor dy = to_channels_last(grad, type);
  MaybeTensor out, pre;
  if (y) out = to_channels_last(*y, type);
  if (u) pre = torch::stable::contiguous(*u, MemoryFormat::ChannelsLast);
  const Ints out_sizes{conv.n, conv.k, conv.oh, conv.ow};
  Tensor dres = need_residual ? empty(out_sizes, type, true) : empty({0}, type);
  Tensor dx = need_x ? empty({conv.n, conv.c, conv.h, conv.w}, type, true) : empty({0}, type);
  Tensor dw =
      need_weight ? empty({conv.k, conv.group_in(), conv.kh, conv.kw}, type) : empty({0}, type);
  Tensor sums = need_sums ? empty({3, conv.n, conv.k}, type) : empty({0}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> g;
    if (need_x || need_weight) g = buffer<T>(grad.numel() + cpu::kernels_of<T>().grad_slack);
    cpu::EpilogueGrad<T> e{};
    e.layout = {conv.n, conv.k, conv.oh * conv.ow, true};
    e.grad = data<T>(dy);
    e.y = data_or_null<T>(out);
    e.u = need_sums ? data_or_null<T>(pre) : nullptr;
    e.mask = data<T>(m.values), e.mask_stride = m.stride;
    e.scale = data<T>(a), e.shift = data<T>(c);
    e.dz = need_residual ? mutable_data<T>(dres) : nullptr;
    e.g = g.get();
    e.sums = need_sums ? mutable_data<T>(sums) : nullptr;
    run_epilogue_grad(e);
    if (need_x) {
      const Tensor kernel = even_taps(as_type(weight, type));
      (winograd ? winograd_input_grad<T> : input_grad<T>)(conv, kernel, g.get(),
                                                          mutable_data<T>(dx));
    }
    if (need_weight) {
      const Tensor input = to_channels_last(x, type);
      weight_grad(conv, g.get(), data<T>(input), mutable_data<T>(dw));
    }
  });
  return {need_x ? as_given(dx, x) : dx, need_weight ? as_type(dw, x.scalar_type()) : dw,
          need_residual ? as_given(dres, x) : dres, sums};
}

}  // namespace mnp::ops
