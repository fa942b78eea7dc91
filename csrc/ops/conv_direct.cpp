#include <algorithm>
#include <utility>

#include "conv.h"
#include "cpu/caches.h"
#include "packed.h"
#include "share.h"

namespace mnp::ops {
namespace {

// Where a kernel's taps stand in packed weights.
struct Places {
  std::vector<int64_t> place;  // of every tap among those used, or -1
  int64_t used = 0;
  void skip() { place.push_back(-1); }
  void use() { place.push_back(used++); }
  // Those of another convolution, which uses other taps of the kernel, behind them.
  void append(const Places& other) {
    place.resize(other.place.size(), -1);
    for (size_t q = 0; q < place.size(); ++q)
      if (other.place[q] >= 0) place[q] = used + other.place[q];
    used += other.used;
  }
};

// Which taps a convolution uses, and where they read.
struct Taps : Places {
  std::vector<int64_t> h, w;  // of those used
  void use(int64_t row, int64_t col) {
    Places::use();
    h.push_back(row);
    w.push_back(col);
  }
};

Taps forward_taps(const Conv& conv) {
  Taps taps;
  for (int64_t i = 0; i < conv.kh; ++i)
    for (int64_t j = 0; j < conv.kw; ++j)
      taps.use(i * conv.dilation[0] - conv.padding[0], j * conv.dilation[1] - conv.padding[1]);
  return taps;
}

// One for each row of the kernel, in a padded image.
Taps row_taps(const Conv& conv) {
  Taps taps;
  for (int64_t i = 0; i < conv.kh; ++i) taps.use(i * conv.dilation[0], 0);
  return taps;
}

// Rows [begin, end) of all images with zeros around them.
template <class T>
void pad(const Conv& conv, const T* x, int64_t begin, int64_t end, T* padded) {
  const int64_t h = conv.h + 2 * conv.padding[0], w = conv.w + 2 * conv.padding[1];
  const int64_t left = conv.padding[1] * conv.c, row = conv.w * conv.c;
  for (int64_t i = begin; i < end; ++i, padded += w * conv.c) {
    const int64_t from = i % h - conv.padding[0];
    if (from < 0 || from >= conv.h) {
      std::fill_n(padded, w * conv.c, T(0));
      continue;
    }
    std::fill_n(padded, left, T(0));
    std::copy_n(x + (i / h * conv.h + from) * row, row, padded + left);
    std::fill_n(padded + left + row, left, T(0));
  }
}

template <class T>
Buffer<T> pad_all(const Conv& conv, const T* x) {
  const int64_t rows = conv.n * (conv.h + 2 * conv.padding[0]);
  const int64_t row = (conv.w + 2 * conv.padding[1]) * conv.c;
  auto padded = buffer<T>(rows * row);
  torch::stable::parallel_for(0, rows, grain(row), [&](int64_t begin, int64_t end) {
    pad(conv, x, begin, end, padded.get() + begin * row);
  });
  return padded;
}

// Input pixels with row % stride = phase meet only the taps whose output row is whole.
Taps phase_taps(const Conv& conv, int64_t phase_h, int64_t phase_w) {
  Taps taps;
  for (int64_t i = 0; i < conv.kh; ++i)
    for (int64_t j = 0; j < conv.kw; ++j) {
      const int64_t h = phase_h + conv.padding[0] - i * conv.dilation[0];
      const int64_t w = phase_w + conv.padding[1] - j * conv.dilation[1];
      if (h % conv.stride[0] || w % conv.stride[1])
        taps.skip();
      else
        taps.use(h / conv.stride[0], w / conv.stride[1]);
    }
  return taps;
}

// How the weights are packed; `transposed` swaps the roles of input and output channels.
template <class T>
cpu::PackPanels<T> packing(const Conv& conv, const Tensor& weight, const Places& taps,
                           bool transposed) {
  cpu::PackPanels<T> a{};
  a.weights = weights_of<T>(weight, transposed);
  a.stride_g = conv.group_out() * weight.stride(0);
  a.place = taps.place.data();
  a.taps = taps.used;
  a.groups = conv.groups;
  a.depth = transposed ? conv.group_out() : conv.group_in();
  a.width = transposed ? conv.group_in() : conv.group_out();
  return a;
}

// A convolution, or one of several with the same input, output and weights, of which each uses
// some: the phases of a gradient of the input.
template <class T>
struct Part {
  cpu::Direct<T> direct;
  int64_t pixels;
  Part(const cpu::Direct<T>& a, const Conv& conv, const Taps& taps)
      : direct(a), pixels(conv.n * a.rows * a.cols) {
    direct.taps = taps.used;
    direct.tap_h = taps.h.data();
    direct.tap_w = taps.w.data();
  }
  // Images of one row, which a 1x1 kernel of stride 1 sees them as.
  void flatten() {
    cpu::Direct<T>& a = direct;
    a.in_w *= a.in_h, a.cols *= a.rows, a.out_w *= a.out_h;
    a.in_h = a.rows = a.out_h = 1;
  }
  // All samples in that row.
  void join(int64_t samples) {
    direct.in_w *= samples, direct.cols *= samples, direct.out_w *= samples;
  }
};

// How a convolution's pixels are computed.
enum class Way { any, rows, padded_rows };

// Pixels [begin, end) of padded images, in parts of one sample whose rows stay in the second cache:
// zeros are put around these when they are read.
template <class T>
void compute_padded(const Conv& conv, cpu::Direct<T> a, int64_t begin, int64_t end) {
  const int64_t row = a.in_w * a.in_stride, span = (conv.kh - 1) * conv.dilation[0] + 1;
  const int64_t fit = a.l2 / 4 / (row * static_cast<int64_t>(sizeof(T)));
  const int64_t most = std::clamp<int64_t>((fit - span) / a.step_h + 1, 1, a.rows);
  const auto padded = buffer<T>(((most - 1) * a.step_h + span) * row);
  const T* const x = a.input;
  a.input = padded.get();
  while (begin < end) {
    const int64_t out_row = begin / a.cols, i = out_row % a.rows;
    const int64_t rows = std::min({most, a.rows - i, (end - 1) / a.cols - out_row + 1});
    a.first_row = out_row / a.rows * a.in_h + i * a.step_h;
    pad(conv, x, a.first_row, a.first_row + (rows - 1) * a.step_h + span, padded.get());
    const int64_t stop = std::min(end, (out_row + rows) * a.cols);
    cpu::kernels_of<T>().direct_rows(a, begin, stop);
    begin = stop;
  }
}

template <class T>
void compute(const cpu::Kernels<T>& kernels, const Conv& conv, const cpu::Direct<T>& a,
             int64_t begin, int64_t end, Way way) {
  if (begin == end) return;
  if (way == Way::rows) return kernels.direct_rows(a, begin, end);
  if (way == Way::padded_rows) return compute_padded(conv, a, begin, end);
  const auto scratch = buffer<char>(kernels.direct_scratch(a));
  kernels.direct(a, begin, end, scratch.get());
}

// How weights are packed where each thread packs those of its own panels: one where it is used, or
// as many as stay in the second cache, for many pixels, or where these are neighbours in memory,
// but so few that all threads get some.
template <class T>
struct OwnPanels {
  int64_t panels, size, most;  // all of them, elements of one, and how many are packed at a time
  OwnPanels(const cpu::PackPanels<T>& weights, int64_t pixels) {
    const auto& kernels = cpu::kernels_of<T>();
    panels = kernels.panels_count(weights);
    cpu::PackPanels<T> one = weights;
    one.width = std::min(one.width, kernels.panel);
    size = kernels.panels_size(one);
    const int64_t bytes = std::max<int64_t>(1, size * int64_t(sizeof(T)));
    const int64_t share = panels / threads();
    const int64_t fit = std::max<int64_t>(1, std::min(share, cpu::caches().l2 / 4 / bytes));
    most = pixels <= weights.width && weights.weights.stride_j != 1 ? 1 : fit;
  }
  // How often each thread passes over all pixels.
  int64_t passes() const {
    const int64_t each = threads() * most;
    return (panels + each - 1) / each;
  }
};

// Each thread computes all pixels of its own panels, and packs these, if they are not `kept`
// packed.
template <class T>
void run_by_panels(const std::vector<Part<T>>& parts, const Conv& conv,
                   const cpu::PackPanels<T>& weights, const OwnPanels<T>& own, int64_t pixels,
                   const T* kept, Way way) {
  const auto& kernels = cpu::kernels_of<T>();
  const cpu::Epilogue<T>& epilogue = *parts[0].direct.epilogue;
  share_out(own.panels, grain(own.size * pixels), own.most, [&] {
    return [&, packed = buffer<T>(kept ? 0 : own.size * own.most)](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p += own.most) {
        const int64_t count = std::min(own.most, end - p), first = p * kernels.panel;
        cpu::PackPanels<T> some = weights;
        some.weights.data += first * some.weights.stride_j;
        some.width = std::min(weights.width - first, count * kernels.panel);
        if (!kept) kernels.pack_panels(some, 0, count, packed.get());
        const cpu::Epilogue<T> e = from_neuron(epilogue, first);
        for (const Part<T>& part : parts) {
          cpu::Direct<T> a = part.direct;
          a.panels = kept ? kept + p * own.size : packed.get(), a.width = some.width;
          a.output += first, a.epilogue = &e;
          compute(kernels, conv, a, 0, part.pixels, way);
        }
      }
    };
  });
}

// Sizes of all parts together.
struct Work {
  int64_t pixels = 0, most = 0, products = 0;  // most: pixels of one part
};

// Gives the parts what they have of the weights.
template <class T>
Work complete(std::vector<Part<T>>& parts, const cpu::PackPanels<T>& weights, bool flat) {
  Work work;
  for (Part<T>& part : parts) {
    cpu::Direct<T>& a = part.direct;
    a.groups = weights.groups, a.width = weights.width;
    a.panel_depth = weights.taps * weights.depth;
    a.out_stride = a.groups * a.width;
    a.l1 = cpu::caches().l1, a.l2 = cpu::caches().l2;
    if (flat) part.flatten();
    work.pixels += part.pixels, work.most = std::max(work.most, part.pixels);
    work.products += part.pixels * a.taps * a.depth * a.width * a.groups;
  }
  return work;
}

// Those whose vectors a group fills.
template <class T>
const cpu::Kernels<T>& kernels_for(const std::vector<Part<T>>& parts, const Conv& conv) {
  const auto& widest = cpu::kernels_of<T>();
  const bool fills = conv.groups == 1 || std::all_of(parts.begin(), parts.end(), [&](auto& part) {
                       return widest.fills_vectors(part.direct);
                     });
  return fills ? widest : cpu::kernels_of_group<T>(parts[0].direct.width);
}

template <class T>
void pack_all(const cpu::Kernels<T>& kernels, const cpu::PackPanels<T>& weights, T* packed) {
  const int64_t panels = kernels.panels_count(weights), size = kernels.panels_size(weights);
  torch::stable::parallel_for(0, panels, grain(size / panels), [&](int64_t begin, int64_t end) {
    kernels.pack_panels(weights, begin, end, packed);
  });
}

// All panels, where they are kept packed.
template <class T>
std::shared_ptr<const T[]> kept_panels(const cpu::Kernels<T>& kernels,
                                       const cpu::PackPanels<T>& weights) {
  const cpu::Weights<T>& w = weights.weights;
  std::vector<int64_t> kind{static_cast<int64_t>(Algorithm::direct),
                            weights.groups,
                            weights.depth,
                            weights.width,
                            weights.stride_g,
                            w.stride_j,
                            w.stride_q,
                            w.stride_d};
  kind.insert(kind.end(), weights.place, weights.place + w.taps);
  return kept_weights<T>(w.data, kind, kernels.panels_size(weights),
                         [&](T* packed) { pack_all(kernels, weights, packed); });
}

// Each thread computes its share of the pixels of every part, which differ in their numbers of
// taps: whole tiles of a long row, images, or rows that are computed together. Few weights that are
// not `kept` packed it packs for itself, if it has much to do with them: that takes less time than
// to get them from another.
template <class T>
void run_by_pixels(const std::vector<Part<T>>& parts, const Conv& conv,
                   const cpu::Kernels<T>& kernels, const cpu::PackPanels<T>& weights,
                   const Work& work, bool few, const T* kept, Way way) {
  constexpr int64_t kTiles = 48, kRows = 4, kWorthPacking = 32;
  const int64_t panels = kernels.panels_count(weights), size = kernels.panels_size(weights);
  const bool each = !kept && few && work.pixels >= kWorthPacking * threads();
  const auto shared = buffer<T>(kept || each ? 0 : size);
  if (!kept && !each) pack_all(kernels, weights, shared.get());
  const int64_t row = parts[0].direct.cols;
  const int64_t unit = way == Way::rows          ? kTiles
                       : way == Way::padded_rows ? row
                       : conv.n >= 4 * threads() ? work.most / conv.n
                                                 : kRows * row;
  const int64_t cost = work.products / std::max<int64_t>(1, work.most);
  share_out(work.most, grain(cost), range_of(work.most, unit), [&] {
    auto packed = buffer<T>(each ? size : 0);
    if (each) kernels.pack_panels(weights, 0, panels, packed.get());
    return [&, packed = std::move(packed)](int64_t begin, int64_t end) {
      for (const Part<T>& part : parts) {
        cpu::Direct<T> a = part.direct;
        a.panels = kept ? kept : each ? packed.get() : shared.get();
        compute(kernels, conv, a, begin * part.pixels / work.most, end * part.pixels / work.most,
                way);
      }
    };
  });
}

template <class T>
void run(std::vector<Part<T>> parts, const Conv& conv, const cpu::PackPanels<T>& weights,
         bool equal_distances = false) {
  const bool flat = conv.is_pointwise() && conv.stride[0] == 1 && conv.stride[1] == 1;
  const Work work = complete(parts, weights, flat);
  const auto& kernels = kernels_for(parts, conv);
  const auto kept = kept_panels(kernels, weights);
  cpu::Direct<T>& first = parts[0].direct;
  // In rows that are as high as the other kernel's tiles. Each would read weights anew that do not
  // stay in the second cache, unless it is a whole image. Whatever the batch: it decides about the
  // rounding.
  const int64_t size = kernels.panels_size(weights);
  const bool few = size * int64_t(sizeof(T)) <= cpu::caches().l2 / 2;
  const bool one_row = flat && first.epilogue->mask_stride == 0;  // of all samples
  const bool in_rows = equal_distances && (one_row || first.cols >= 8) && (few || first.in_h == 1);
  const int64_t read = conv.n * first.in_h * first.in_w * first.in_stride;
  if (in_rows && one_row) parts[0].join(conv.n);
  const bool is_padded =
      conv.reads_rows() && equal_distances && (conv.padding[0] > 0 || conv.padding[1] > 0);
  const Way way = !in_rows ? Way::any : is_padded ? Way::padded_rows : Way::rows;
  const auto padded = is_padded && !in_rows ? pad_all(conv, first.input) : nullptr;
  if (padded) first.input = padded.get();
  // What one thread packs, the other ones would get slowly; but all are to have panels, and images
  // are not to be read too often for it.
  const OwnPanels<T> own(weights, work.pixels);
  const bool by_thread =
      !kept && !few && own.panels >= 4 * threads() && own.passes() * read <= 16 * size;
  if (conv.groups == 1 && (work.pixels <= weights.width || by_thread))
    run_by_panels(parts, conv, weights, own, work.pixels, kept.get(), way);
  else
    run_by_pixels(parts, conv, kernels, weights, work, few, kept.get(), way);
}

// Pixels that no tap meets: their sum is the residual, or 0.
template <class T>
void write_without_taps(const cpu::Direct<T>& a, const Conv& conv) {
  const T* const residual = a.epilogue->residual;
  torch::stable::parallel_for(
      0, conv.n * a.rows, grain(a.cols * conv.c), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t row = r / a.rows * a.out_h + a.out_origin_h + r % a.rows * a.out_step_h;
          for (int64_t j = 0; j < a.cols; ++j) {
            const int64_t at = (row * a.out_w + a.out_origin_w + j * a.out_step_w) * conv.c;
            if (residual)
              std::copy_n(residual + at, conv.c, a.output + at);
            else
              std::fill_n(a.output + at, conv.c, T(0));
          }
        }
      });
}

}  // namespace

template <class T>
void direct_forward(const Conv& conv, const Tensor& weight, const T* x,
                    const cpu::Epilogue<T>& epilogue, T* y) {
  const Taps taps = forward_taps(conv);
  const auto weights = packing<T>(conv, weight, taps, false);
  cpu::Direct<T> a{};
  a.input = x;
  a.in_h = conv.h, a.in_w = conv.w, a.in_stride = conv.c;
  a.depth = conv.group_in();
  a.rows = a.out_h = conv.oh, a.cols = a.out_w = conv.ow;
  a.step_h = conv.stride[0], a.step_w = conv.stride[1];
  a.output = y;
  a.out_step_h = a.out_step_w = 1;
  a.epilogue = &epilogue;
  if (conv.reads_rows()) {
    a.in_h += 2 * conv.padding[0], a.in_w += 2 * conv.padding[1];
    a.depth *= conv.kw;
    const Taps rows = row_taps(conv);
    return run<T>({{a, conv, rows}}, conv, weights, true);
  }
  run<T>({{a, conv, taps}}, conv, weights, conv.is_pointwise());
}

template <class T>
void direct_input_grad(const Conv& conv, const Tensor& weight, const T* g, int64_t g_stride,
                       const cpu::Epilogue<T>& epilogue, T* dx) {
  std::vector<Taps> phases;  // of the parts, which point into them
  std::vector<Part<T>> parts;
  Places together;
  for (int64_t phase_h = 0; phase_h < std::min(conv.stride[0], conv.h); ++phase_h)
    for (int64_t phase_w = 0; phase_w < std::min(conv.stride[1], conv.w); ++phase_w) {
      Taps taps = phase_taps(conv, phase_h, phase_w);
      cpu::Direct<T> a{};
      a.input = g;
      a.in_h = conv.oh, a.in_w = conv.ow, a.in_stride = g_stride;
      a.depth = conv.group_out();
      a.rows = (conv.h - phase_h + conv.stride[0] - 1) / conv.stride[0];
      a.cols = (conv.w - phase_w + conv.stride[1] - 1) / conv.stride[1];
      a.step_h = a.step_w = 1;
      a.output = dx;
      a.out_h = conv.h, a.out_w = conv.w;
      a.out_step_h = conv.stride[0], a.out_step_w = conv.stride[1];
      a.out_origin_h = phase_h, a.out_origin_w = phase_w;
      a.epilogue = &epilogue;
      a.panel_first = together.used * a.depth;
      if (taps.used == 0) {
        write_without_taps(a, conv);
        continue;
      }
      parts.emplace_back(a, conv, taps);
      together.append(taps);
      phases.push_back(std::move(taps));
    }
  if (!parts.empty())
    run(parts, conv, packing<T>(conv, weight, together, true), conv.is_pointwise());
}

template <class T>
void direct_weight_grad(const Conv& conv, const T* g, int64_t g_stride, const T* x, T* dw) {
  const auto& kernels = cpu::kernels_of<T>();
  const Taps taps = forward_taps(conv);
  cpu::WeightGrad<T> a{};
  a.grad = g, a.grad_stride = g_stride, a.input = x, a.weight_grad = dw;
  a.batch = conv.n, a.rows = conv.oh, a.cols = conv.ow;
  a.in_h = conv.h, a.in_w = conv.w, a.in_channels = conv.c;
  a.groups = conv.groups, a.depth = conv.group_in(), a.width = conv.group_out();
  a.taps = conv.taps(), a.tap_h = taps.h.data(), a.tap_w = taps.w.data();
  a.step_h = conv.stride[0], a.step_w = conv.stride[1];
  a.l2 = cpu::caches().l2;
  const int64_t pixels = conv.n * conv.oh * conv.ow;
  if (conv.is_depthwise())
    return torch::stable::parallel_for(
        0, conv.groups, grain(pixels * a.taps),
        [&](int64_t begin, int64_t end) { kernels.depthwise_weight_grad(a, begin, end); });
  torch::stable::parallel_for(
      0, kernels.weight_grad_units(a), grain(pixels * a.width), [&](int64_t begin, int64_t end) {
        const auto scratch = buffer<T>(kernels.weight_grad_scratch(a, end - begin));
        kernels.weight_grad(a, begin, end, scratch.get());
      });
}

template void direct_forward(const Conv&, const Tensor&, const float*, const cpu::Epilogue<float>&,
                             float*);
template void direct_input_grad(const Conv&, const Tensor&, const float*, int64_t,
                                const cpu::Epilogue<float>&, float*);
template void direct_weight_grad(const Conv&, const float*, int64_t, const float*, float*);
template void direct_forward(const Conv&, const Tensor&, const double*,
                             const cpu::Epilogue<double>&, double*);
template void direct_input_grad(const Conv&, const Tensor&, const double*, int64_t,
                                const cpu::Epilogue<double>&, double*);
template void direct_weight_grad(const Conv&, const double*, int64_t, const double*, double*);

}  // namespace mnp::ops
