#include "conv.h"

namespace mnp::ops {
namespace {

bool both(const int64_t* values, int64_t value) { return values[0] == value && values[1] == value; }

}  // namespace

Algorithm choose_algorithm(const char* op, const Conv& conv, const std::string& name,
                           ScalarType type, Result result) {
  const bool backward = result == Result::input_grad;
  MNP_CHECK(name == "auto" || name == "direct" || name == "winograd2" || name == "winograd4", op,
            ": algorithm must be 'auto', 'direct', 'winograd2' or 'winograd4', not '", name, "'");
  const bool by_two = both(conv.stride, 2);
  const bool possible = conv.kh == 3 && conv.kw == 3 && both(conv.dilation, 1) &&
                        conv.groups == 1 &&
                        (both(conv.stride, 1) || (by_two && name != "winograd2"));
  MNP_CHECK(possible || name == "auto" || name == "direct", op, ": algorithm '", name,
            "' needs a 3x3 kernel with stride 1", name == "winograd4" ? " or 2" : "",
            ", dilation 1 and groups 1, not ", conv.kh, "x", conv.kw, ", stride ", conv.stride[0],
            "x", conv.stride[1], ", dilation ", conv.dilation[0], "x", conv.dilation[1],
            " and groups ", conv.groups);
  // Only odd paddings have gradients of the input by Winograd with stride 2.
  const bool even = conv.padding[0] % 2 == 0 || conv.padding[1] % 2 == 0;
  if (!possible || name == "direct" || (backward && by_two && even)) return Algorithm::direct;
  if (name == "winograd2") return Algorithm::winograd2;
  if (name == "winograd4") return Algorithm::winograd4;
  // Where F(4x4, 3x3) was no slower, measured with one thread on AVX2.
  const int64_t rows = backward ? conv.h : conv.oh, cols = backward ? conv.w : conv.ow;
  const int64_t depth = backward ? conv.k : conv.c, edge = backward && by_two ? 8 : 4;
  const int64_t tiles = conv.n * ((rows + edge - 1) / edge) * ((cols + edge - 1) / edge);
  // Gradients of weights gain from fewer channels and tiles.
  const bool easy = result == Result::weight_grad && !by_two;
  const bool full = conv.n * rows * cols * 16 >= (easy ? 8 : 10) * tiles * edge * edge;
  const bool large = easy || (depth >= 8 && tiles >= 8);
  const bool faster = type == ScalarType::Float && large && full;
  return faster ? Algorithm::winograd4 : Algorithm::direct;
}

}  // namespace mnp::ops
