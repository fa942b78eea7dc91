#include "region.h"

#include "conv.h"

namespace mnp::ops {
namespace {

constexpr double kSmallMask = 0.125;  // divided by smaller ones, an output's rounding errors grow

// Takes one number or tensor after the other.
template <class T>
class Reader {
 public:
  Reader(const char* what, const std::vector<T>& items) : what_(what), items_(items) {}
  const T& next() {
    MNP_CHECK(at_ < items_.size(), kRegion, ": ", what_, " is too short");
    return items_[at_++];
  }
  void finish() const { MNP_CHECK(at_ == items_.size(), kRegion, ": ", what_, " is too long"); }
  int64_t position() const { return static_cast<int64_t>(at_); }

 private:
  const char* what_;
  const std::vector<T>& items_;
  size_t at_ = 0;
};

// Whether outputs can be divided by a mask. Those beyond 1 are none; NaN is not comparable.
bool can_divide_by(const Tensor& mask) {
  bool can = true;
  with_type(mask.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const values = data<T>(mask);
    for (int64_t i = 0; i < mask.numel(); ++i)
      if (!(values[i] >= T(kSmallMask) && values[i] <= 1)) can = false;
  });
  return can;
}

}  // namespace

Region::Region(int64_t input_count, const std::vector<Tensor>& tensors, const Ints& plan,
               const std::vector<double>& eps, const Names& algorithms, const Ints& outputs,
               const Ints& needed)
    : inputs(input_count) {
  MNP_CHECK(static_cast<int64_t>(needed.size()) == inputs + static_cast<int64_t>(tensors.size()),
            kRegion, ": needed must have a number for each input and part");
  MNP_CHECK(algorithms.size() == eps.size(), kRegion, ": eps and algorithms must be one a block");
  Reader<int64_t> numbers("plan", plan);
  Reader<Tensor> parts("parts", tensors);
  const auto needs = [&](int64_t part) { return needed[inputs + part] != 0; };
  wanted.assign(needed.begin(), needed.begin() + inputs);
  kept.assign(inputs + eps.size(), false);
  for (const double e : eps) {
    Block b{};
    const auto value = [&](int64_t least) {
      const int64_t number = numbers.next();
      MNP_CHECK(number >= least && number < static_cast<int64_t>(wanted.size()), kRegion,
                ": a block reads value ", number, ", of ", wanted.size());
      return number;
    };
    const auto pair = [&] {
      const int64_t first = numbers.next();
      return Ints{first, numbers.next()};
    };
    b.x = value(0), b.residual = value(-1), b.relu = numbers.next() != 0;
    b.stride = pair(), b.padding = pair(), b.dilation = pair(), b.groups = numbers.next();
    b.algorithm = algorithms[wanted.size() - inputs];
    const int64_t given = numbers.next(), masked = numbers.next();
    Neurons& n = b.neurons;
    n.eps = e;
    n.masks_conv_bias = masked & 1, n.masks_mean = masked & 2, n.masks_norm_bias = masked & 4;
    b.first_part = parts.position();
    b.needs_weight = needs(b.first_part), b.weight = parts.next();
    const auto vector = [&](Vector which) {
      b.parts[which] = parts.position(), b.needs[which] = needs(b.parts[which]);
      return parts.next();
    };
    for (int64_t& part : b.parts) part = -1;
    n.mask = vector(kMask);
    if (given & 1) n.conv_bias = vector(kConvBias);
    if (given & 2) n.norm_weight = vector(kNormWeight);
    if (given & 4) n.norm_bias = vector(kNormBias);
    if (given & 8) n.mean = parts.next();
    if (given & 16) n.var = parts.next();
    if (b.needs_weight) kept[b.x] = true;
    wanted.push_back(wanted[b.x] || (b.residual >= 0 && wanted[b.residual]) || b.needs_weight ||
                     b.needs_vectors());
    blocks.push_back(std::move(b));
  }
  numbers.finish(), parts.finish();
  returned.assign(values(), false), averaged.assign(blocks.size(), false);
  for (const int64_t output : outputs) {
    MNP_CHECK(output >= 0 && output < values() + static_cast<int64_t>(blocks.size()), kRegion,
              ": there is no value ", output);
    (output < values() ? returned[output] : averaged[output - values()]) = true;
  }
}

bool Region::can_recover_u(const Block& b) const {
  const auto stays = [&](int64_t value) { return value >= inputs && !returned[value]; };
  return b.needs[kMask] && !b.needs[kNormWeight] && stays(output_of(b)) &&
         (b.residual < 0 || stays(b.residual)) && can_divide_by(b.neurons.mask);
}

void Region::set_recovers_u(Block& b, bool recovers) {
  b.recovers_u = recovers;
  if (!recovers) return;
  kept[output_of(b)] = true;
  if (b.residual >= 0) kept[b.residual] = true;
}

bool Region::keeps_active(const Block& b) const {
  return b.relu && wanted[output_of(b)] && !kept[output_of(b)];
}

std::vector<int64_t> Region::last_reads() const {
  std::vector<int64_t> last(values(), -1);
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    last[blocks[i].x] = i;
    if (blocks[i].residual >= 0) last[blocks[i].residual] = i;
  }
  return last;
}

std::vector<Ints> Region::sizes(std::vector<Ints> of_inputs) const {
  for (const Block& b : blocks) {
    const Conv conv(kRegion, of_inputs[b.x], b.weight, b.stride, b.padding, b.dilation, b.groups);
    of_inputs.push_back({conv.n, conv.k, conv.oh, conv.ow});
  }
  return of_inputs;
}

}  // namespace mnp::ops
