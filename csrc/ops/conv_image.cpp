#include "conv.h"
#include "packed.h"
#include "share.h"

namespace mnp::ops {

template <class T>
void image_input_grad(const Conv& conv, const Tensor& weight, const T* g, int64_t g_stride,
                      const T* add, T* dx) {
  const auto& kernels = cpu::kernels_of<T>();
  cpu::ImageGrad<T> a{};
  a.grad = g, a.grad_stride = g_stride;
  a.batch = conv.n, a.rows = conv.oh, a.cols = conv.ow, a.depth = conv.k;
  a.taps_h = conv.kh, a.taps_w = conv.kw, a.channels = conv.c;
  a.in_h = conv.h, a.in_w = conv.w;
  a.step_h = conv.stride[0], a.step_w = conv.stride[1];
  a.padding_h = conv.padding[0], a.padding_w = conv.padding[1];
  a.dilation_h = conv.dilation[0], a.dilation_w = conv.dilation[1];
  a.add = add, a.output = dx;

  const int64_t place = 0, width = conv.taps() * conv.c;
  cpu::PackPanels<T> panels{};
  panels.place = &place, panels.taps = 1;
  panels.groups = 1, panels.depth = conv.k, panels.width = width;
  const auto pack = [&](T* packed) {
    const Tensor arranged = to_channels_last(weight);  // all taps' channels next to each other
    panels.weights = {data<T>(arranged), 1, 0, width, 1};
    kernels.pack_panels(panels, 0, kernels.panels_count(panels), packed);
  };
  const int64_t size = kernels.panels_size(panels);
  const auto kept = kept_weights<T>(
      data<T>(weight),
      {static_cast<int64_t>(Algorithm::image), conv.k, conv.c, weight.stride(0), weight.stride(1)},
      size, pack);
  const auto own = buffer<T>(kept ? 0 : size);
  if (!kept) pack(own.get());
  a.panels = kept ? kept.get() : own.get();
  const int64_t rows = conv.n * conv.h;
  share_out(rows, grain(conv.w * width * conv.k), range_of(rows, conv.h), [&] {
    return [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<T>(kernels.image_grad_scratch(a, end - begin));
      kernels.image_grad(a, begin, end, scratch.get());
    };
  });
}

template void image_input_grad(const Conv&, const Tensor&, const float*, int64_t, const float*,
                               float*);
template void image_input_grad(const Conv&, const Tensor&, const double*, int64_t, const double*,
                               double*);

}  // namespace mnp::ops
