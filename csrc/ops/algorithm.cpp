#include <algorithm>

#include "conv.h"

namespace mnp::ops {
namespace {

constexpr int64_t kFewestTiles = 8;
constexpr int64_t kFewestByTwo = 8192;  // with stride 2, tiles times input channels

bool both(const int64_t* values, int64_t value) { return values[0] == value && values[1] == value; }

// Images of results and the channels that are summed over.
struct Work {
  int64_t n, rows, cols, depth;
  const int64_t* dilation;
  int64_t tiles(int64_t edge) const {
    const auto along = [&](int64_t size, int64_t step) {
      return ((size + step - 1) / step + edge - 1) / edge * std::min(step, size);
    };
    return n * along(rows, dilation[0]) * along(cols, dilation[1]);
  }
};

// Products a result and channel; transforms, which take as long for one neuron as for many, count
// as more of them. The numbers fit times measured with one thread on AVX2.
double cost(const Work& work, int64_t edge, double products, double flat, double transforms) {
  const double results = static_cast<double>(work.n * work.rows * work.cols);
  return work.tiles(edge) * products / results * (flat + transforms / work.depth);
}

// Groups of so few channels that one of Winograd's transforms serves too few products.
bool is_narrow(const Conv& conv) {
  const int64_t fewest = conv.kh == 5 ? 24 : 12;
  return conv.groups > 1 && (conv.group_in() < fewest || conv.group_out() < fewest);
}

// The fastest of Winograd's algorithms, all of which can compute the result, and the direct one.
Algorithm fastest(const Conv& conv, Result result) {
  const bool backward = result == Result::input_grad, by_two = conv.stride[0] == 2;
  if (is_narrow(conv) || (conv.groups > 1 && by_two)) return Algorithm::direct;
  if (conv.is_two_by_two() && result != Result::weight_grad) return Algorithm::winograd2;
  const Work work{conv.n, backward ? conv.h : conv.oh, backward ? conv.w : conv.ow,
                  backward ? conv.group_out() : conv.group_in(), conv.dilation};
  if (conv.kh == 5) {
    // Where it takes clearly less than the direct kernels, and torch's.
    const bool gains = work.tiles(2) >= kFewestTiles && cost(work, 2, 36, 1.2, 20) < 0.9 * 25;
    return gains ? Algorithm::winograd4 : Algorithm::direct;
  }
  if (result == Result::weight_grad) {
    // These gain from fewer tiles. Both the channels in and out are transformed for the products.
    const int64_t tiles = work.tiles(4), results = work.n * work.rows * work.cols;
    const int64_t in = conv.group_in(), out = conv.group_out();
    const bool gains =
        by_two ? tiles >= kFewestTiles && results >= 10 * tiles : results >= 8 * tiles;
    const bool many = in * out >= (by_two ? 16 : 9) * (in + out);
    return gains && many ? Algorithm::winograd4 : Algorithm::direct;
  }
  if (by_two) {
    // Where it takes clearly less than the direct kernels, for a gradient one for each phase.
    const int64_t edge = backward ? 8 : 4;
    const double direct = backward ? 0.85 * 9 / 4 : 0.92 * 9;
    const double four = cost(work, edge, 81, 1.2, 20), two = cost(work, edge / 2, 25, 1.1, 22);
    if (work.tiles(edge) * conv.group_in() < kFewestByTwo) return Algorithm::direct;
    if (four < direct && four <= two) return Algorithm::winograd4;
    return two < direct ? Algorithm::winograd2 : Algorithm::direct;
  }
  const double direct = 9, four = cost(work, 4, 36, 1.2, 20), two = cost(work, 2, 16, 1.1, 22);
  if (work.tiles(4) >= kFewestTiles && four < direct && four <= two) return Algorithm::winograd4;
  if (work.tiles(2) >= kFewestTiles && two < direct) return Algorithm::winograd2;
  return Algorithm::direct;
}

// Whether the kernels of groups compute blocks of outputs, which share inputs (cpu/grouped.h).
bool fits_blocks(const Conv& conv) {
  const bool three = conv.kh == 3 && conv.kw == 3 && (both(conv.stride, 1) || both(conv.stride, 2));
  const bool small = conv.kh <= 2 && conv.kw <= 2 && both(conv.stride, 1);
  return (three || small) && both(conv.dilation, 1);
}

// Where torch's convolution and a pass over its output take less time than the direct kernels,
// which has been measured with AVX-512. It costs more to call.
bool torch_wins(const Conv& conv) {
  constexpr int64_t kWorthACall = int64_t{4} << 20;  // multiply-adds
  const int64_t lanes = cpu::kernels_of<float>().panel / 2;
  if (lanes < 16 || conv.products() < kWorthACall || conv.reads_rows()) return false;
  if (conv.is_depthwise()) return false;
  if (conv.groups == 1) return conv.taps() > 9;
  // Narrower groups share vectors well, wider ones fill them.
  return !fits_blocks(conv) && conv.group_out() >= 8 &&
         (conv.taps() > 9 || conv.group_out() < lanes);
}

// The same of the gradient of weights: except for wide layers with few pixels.
bool torch_wins_weight_grad(const Conv& conv) {
  constexpr int64_t kWorthACall = int64_t{1} << 18;  // multiply-adds
  constexpr int64_t kFew = 1024, kWide = 64;         // pixels, channels
  const bool wide = conv.groups == 1 && conv.c >= kWide && conv.k >= kWide;
  return conv.products() >= kWorthACall && !(wide && conv.n * conv.oh * conv.ow <= kFew);
}

// Whether the direct kernels would leave most of a vector's lanes unused in the gradient of the
// input, and all taps' channels together fill some.
bool is_image(const Conv& conv, ScalarType type) {
  const int64_t panel =
      type == ScalarType::Double ? cpu::kernels_of<double>().panel : cpu::kernels_of<float>().panel;
  return conv.groups == 1 && conv.taps() > 1 && conv.c <= panel / 4 && conv.k <= cpu::kLongestSum;
}

}  // namespace

Algorithm choose_algorithm(const char* op, const Conv& conv, const std::string& name,
                           ScalarType type, Result result) {
  const bool backward = result == Result::input_grad;
  MNP_CHECK(name == "auto" || name == "direct" || name == "winograd2" || name == "winograd4", op,
            ": algorithm must be 'auto', 'direct', 'winograd2' or 'winograd4', not '", name, "'");
  const bool by_one = both(conv.stride, 1), by_two = both(conv.stride, 2);
  const bool five = conv.kh == 5 && conv.kw == 5 && by_one && name != "winograd2";
  const bool with_two = by_two && both(conv.dilation, 1);
  const bool three = conv.kh == 3 && conv.kw == 3 && (by_one || with_two);
  const bool possible = three || five;
  MNP_CHECK(possible || name == "auto" || name == "direct", op, ": algorithm '", name,
            "' needs a 3x3 kernel with stride 1, or 2 and dilation 1",
            name == "winograd4" ? ", or a 5x5 one with stride 1" : "", ", not ", conv.kh, "x",
            conv.kw, ", stride ", conv.stride[0], "x", conv.stride[1], " and dilation ",
            conv.dilation[0], "x", conv.dilation[1]);
  const bool plain = name == "auto" || name == "direct";
  if (plain && backward && is_image(conv, type)) return Algorithm::image;
  // With stride 2, only odd paddings have gradients of the input by Winograd.
  const bool even = conv.padding[0] % 2 == 0 || conv.padding[1] % 2 == 0;
  const bool lacks_weights = five || conv.groups > 1 || (by_two && name == "winograd2");
  const bool lacks =
      (backward && by_two && even) || (result == Result::weight_grad && lacks_weights);
  if (possible && !lacks && name == "winograd2") return Algorithm::winograd2;
  if (possible && !lacks && name == "winograd4") return Algorithm::winograd4;
  if (name != "auto" || type != ScalarType::Float) return Algorithm::direct;
  const Algorithm best = possible && !lacks ? fastest(conv, result) : Algorithm::direct;
  const bool torch = result == Result::weight_grad ? torch_wins_weight_grad(conv)
                                                   : result == Result::output && torch_wins(conv);
  return best == Algorithm::direct && torch ? Algorithm::torch : best;
}

}  // namespace mnp::ops
