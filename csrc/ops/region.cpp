#include "block.h"
#include "conv.h"
#include "image.h"
#include "masked_conv2d.h"
#include "passes.h"

namespace mnp::ops {
namespace {

const char* const kOp = "mnp_fast region";
constexpr double kSmallMask = 0.125;  // divided by smaller ones, an output's rounding errors grow

struct Block {
  int64_t x, residual;
  bool relu;
  Ints stride, padding, dilation;
  int64_t groups;
  std::string algorithm;
  Tensor weight;
  Neurons neurons;
  bool needs_weight, needs[kVectors];
  int64_t first_part, parts[kVectors];  // where they are among all; -1 for those it has not
  bool recovers_u;                      // from its output, in the backward

  int64_t count() const { return weight.dim() > 0 ? weight.size(0) : 0; }
  bool needs_vectors() const { return needs[0] || needs[1] || needs[2] || needs[3]; }
  const char* activation() const { return relu ? "relu" : "none"; }
};

// Takes one number or tensor after the other.
template <class T>
class Reader {
 public:
  Reader(const char* what, const std::vector<T>& items) : what_(what), items_(items) {}
  const T& next() {
    MNP_CHECK(at_ < items_.size(), kOp, ": ", what_, " is too short");
    return items_[at_++];
  }
  void finish() const { MNP_CHECK(at_ == items_.size(), kOp, ": ", what_, " is too long"); }
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

// The blocks, what of them takes gradients, and what the backward needs.
struct Region {
  int64_t inputs;
  std::vector<Block> blocks;
  std::vector<char> wanted;    // of each value, whether it takes gradients
  std::vector<char> returned;  // and whether the caller gets it, who may change it in place
  std::vector<char> kept;      // and whether the backward reads it
  std::vector<char> averaged;  // of each block, whether the caller gets the mean of u

  Region(int64_t input_count, const std::vector<Tensor>& tensors, const Ints& plan,
         const std::vector<double>& eps, const Names& algorithms, const Ints& outputs,
         const Ints& needed)
      : inputs(input_count) {
    MNP_CHECK(static_cast<int64_t>(needed.size()) == inputs + static_cast<int64_t>(tensors.size()),
              kOp, ": needed must have a number for each input and part");
    MNP_CHECK(algorithms.size() == eps.size(), kOp, ": eps and algorithms must be one a block");
    Reader<int64_t> numbers("plan", plan);
    Reader<Tensor> parts("parts", tensors);
    const auto needs = [&](int64_t part) { return needed[inputs + part] != 0; };
    wanted.assign(needed.begin(), needed.begin() + inputs);
    kept.assign(inputs + eps.size(), false);
    for (const double e : eps) {
      Block b{};
      const auto value = [&](int64_t least) {
        const int64_t number = numbers.next();
        MNP_CHECK(number >= least && number < static_cast<int64_t>(wanted.size()), kOp,
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
      MNP_CHECK(output >= 0 && output < values() + static_cast<int64_t>(blocks.size()), kOp,
                ": there is no value ", output);
      (output < values() ? returned[output] : averaged[output - values()]) = true;
    }
  }

  int64_t values() const { return inputs + static_cast<int64_t>(blocks.size()); }
  int64_t output_of(const Block& b) const { return inputs + (&b - blocks.data()); }
  static bool needs_u(const Block& b) { return b.needs[kMask] || b.needs[kNormWeight]; }
  // Whether the backward can do with the output, and with the residual where there is one.
  bool can_recover_u(const Block& b) const {
    const auto stays = [&](int64_t value) { return value >= inputs && !returned[value]; };
    return b.needs[kMask] && !b.needs[kNormWeight] && stays(output_of(b)) &&
           (b.residual < 0 || stays(b.residual)) && can_divide_by(b.neurons.mask);
  }
  void set_recovers_u(Block& b, bool recovers) {
    b.recovers_u = recovers;
    if (!recovers) return;
    kept[output_of(b)] = true;
    if (b.residual >= 0) kept[b.residual] = true;
  }
  // The activity of a ReLU, a byte an element, where the output is not kept.
  bool keeps_active(const Block& b) const {
    return b.relu && wanted[output_of(b)] && !kept[output_of(b)];
  }
  // Of each value the last block that reads it, -1 if none does.
  std::vector<int64_t> last_reads() const {
    std::vector<int64_t> last(values(), -1);
    for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
      last[blocks[i].x] = i;
      if (blocks[i].residual >= 0) last[blocks[i].residual] = i;
    }
    return last;
  }
};

// Means (K,) of images (N, K, H, W), channels-last.
Tensor means_of(const Tensor& u) {
  const int64_t batch = u.size(0), count = u.size(1), pixels = u.size(2) * u.size(3);
  const Tensor ones = torch::stable::full({count}, 1, u.scalar_type());
  Tensor sums = empty({3, batch, count}, u.scalar_type()), means = empty({count}, u.scalar_type());
  with_type(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cpu::EpilogueGrad<T> e{};  // whose first sums are those of what it is given
    e.layout = {batch, count, pixels, true};
    e.grad = data<T>(u), e.sums = mutable_data<T>(sums);
    e.mask = e.scale = e.shift = data<T>(ones);
    run_epilogue_grad(e);
    for (int64_t k = 0; k < count; ++k) {
      double total = 0;
      for (int64_t n = 0; n < batch; ++n) total += e.sums[n * count + k];
      mutable_data<T>(means)[k] = static_cast<T>(total / (batch * pixels));
    }
  });
  return means;
}

// The gradient (K,) of each pixel by that of the means.
Tensor gradient_of_means(const Tensor& grad, const Ints& sizes) {
  check_vector(kOp, "the gradient of means", grad, sizes[1], grad, grad.scalar_type());
  const Tensor given = to_contiguous(grad);
  Tensor each = empty({sizes[1]}, grad.scalar_type());
  with_type(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t k = 0; k < sizes[1]; ++k)
      mutable_data<T>(each)[k] = data<T>(given)[k] / (sizes[0] * sizes[2] * sizes[3]);
  });
  return each;
}

// The sum of two images, channels-last.
Tensor sum_of(const Tensor& a, const Tensor& b) {
  check_like(kOp, "the gradient of a residual", a, b);
  const Tensor left = to_channels_last(a), right = to_channels_last(b);
  Tensor sum = empty_image(sizes_of(a), a.scalar_type());
  with_type(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *const x = data<T>(left), *const y = data<T>(right);
    T* const out = mutable_data<T>(sum);
    torch::stable::parallel_for(0, a.numel(), grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = x[i] + y[i];
    });
  });
  return sum;
}

}  // namespace

std::vector<Tensor> region_forward(const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& parts, const Ints& plan,
                                   const std::vector<double>& eps, const Names& algorithms,
                                   const Ints& outputs, const Ints& needed) {
  Region region(static_cast<int64_t>(inputs.size()), parts, plan, eps, algorithms, outputs, needed);
  for (const Tensor& x : inputs)
    MNP_CHECK(compute_type(kOp, x) == x.scalar_type(), kOp, ": inputs must be float32 or float64");
  for (Block& b : region.blocks) {
    b.neurons.prepare(kOp, b.count(), inputs[0]);
    region.set_recovers_u(b, region.can_recover_u(b));
  }
  std::vector<int64_t> last = region.last_reads();
  std::vector<MaybeTensor> values(inputs.begin(), inputs.end());
  std::vector<Tensor> kept_u, kept_active;
  std::vector<MaybeTensor> means(region.blocks.size());
  for (size_t i = 0; i < region.blocks.size(); ++i) {
    const Block& b = region.blocks[i];
    const Tensor& x = *values[b.x];
    const Terms terms = b.neurons.terms(b.count(), x.scalar_type());
    const bool keep_u = region.needs_u(b) && !b.recovers_u;
    const bool keep_active = region.keeps_active(b);
    auto [y, u, active] = conv2d_forward(
        x, b.weight, b.neurons.mask, terms.scale, terms.shift, terms.bias,
        b.residual < 0 ? std::nullopt : values[b.residual], b.stride, b.padding, b.dilation,
        b.groups, b.activation(), keep_u || region.averaged[i], keep_active, b.algorithm);
    values.emplace_back(std::move(y));
    if (region.averaged[i]) means[i] = means_of(u);
    if (region.needs_u(b))
      kept_u.push_back(keep_u ? std::move(u) : empty({0}, b.weight.scalar_type()));
    if (keep_active) kept_active.push_back(std::move(active));
    for (const int64_t number : {b.x, b.residual})
      if (number >= 0 && last[number] == static_cast<int64_t>(i) && !region.returned[number] &&
          !region.kept[number])
        values[number].reset();
  }
  std::vector<Tensor> results;
  for (const int64_t output : outputs)
    results.push_back(output < region.values() ? *values[output]
                                               : *means[output - region.values()]);
  results.insert(results.end(), kept_u.begin(), kept_u.end());
  for (int64_t number = region.inputs; number < region.values(); ++number)
    if (region.kept[number]) results.push_back(*values[number]);
  results.insert(results.end(), kept_active.begin(), kept_active.end());
  return results;
}

std::vector<Tensor> region_backward(const std::vector<MaybeTensor>& given,
                                    const std::vector<Tensor>& kept,
                                    const std::vector<Tensor>& parts, const Ints& plan,
                                    const std::vector<double>& eps, const Names& algorithms,
                                    const Ints& outputs, const Ints& needed,
                                    const Ints& input_sizes) {
  MNP_CHECK(given.size() == outputs.size() && input_sizes.size() % 4 == 0, kOp,
            ": grads must be one an output, and sizes four an input");
  Region region(static_cast<int64_t>(input_sizes.size()) / 4, parts, plan, eps, algorithms, outputs,
                needed);
  const int64_t count = static_cast<int64_t>(region.blocks.size());
  Reader<Tensor> state("kept", kept);
  std::vector<MaybeTensor> values(region.values()), actives(count);
  std::vector<KnownU> known(count);
  for (int64_t number = 0; number < region.inputs; ++number)
    if (region.kept[number]) values[number] = state.next();
  for (int64_t i = 0; i < count; ++i)
    if (Block& b = region.blocks[i]; region.needs_u(b)) {
      const Tensor& u = state.next();
      region.set_recovers_u(b, u.dim() != 4);  // else the forward has put nothing in its place
      if (!b.recovers_u) known[i].u = u;
    }
  for (int64_t number = region.inputs; number < region.values(); ++number)
    if (region.kept[number]) values[number] = state.next();
  for (int64_t i = 0; i < count; ++i)
    if (region.keeps_active(region.blocks[i])) actives[i] = state.next();
  state.finish();
  std::vector<Ints> sizes;
  for (size_t i = 0; i < input_sizes.size(); i += 4)
    sizes.emplace_back(input_sizes.begin() + i, input_sizes.begin() + i + 4);
  for (const Block& b : region.blocks) {
    const Conv conv(kOp, sizes[b.x], b.weight, b.stride, b.padding, b.dilation, b.groups);
    sizes.push_back({conv.n, conv.k, conv.oh, conv.ow});
  }

  std::vector<MaybeTensor> grads(region.values()), mean_grads(count);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const int64_t block = outputs[i] - region.values();
    (block < 0 ? grads[outputs[i]] : mean_grads[block]) = given[i];
  }
  const auto add_to = [&](int64_t value, const Tensor& grad) {
    grads[value] = grads[value] ? sum_of(*grads[value], grad) : grad;
  };
  std::vector<Tensor> results(region.inputs + static_cast<int64_t>(parts.size()));
  for (int64_t i = count; i-- > 0;) {
    Block& b = region.blocks[i];
    const int64_t number = region.output_of(b);
    MaybeTensor grad = std::move(grads[number]), add_to_u;
    grads[number].reset();
    if (!region.wanted[number]) continue;
    if (mean_grads[i]) {
      add_to_u = gradient_of_means(*mean_grads[i], sizes[number]);
      if (!grad) grad = torch::stable::full(sizes[number], 0, add_to_u->scalar_type());
    }
    if (!grad) continue;
    const bool need_x = region.wanted[b.x];
    const bool need_residual = b.residual >= 0 && region.wanted[b.residual];
    if (need_residual && !b.relu) add_to(b.residual, *grad);
    b.neurons.prepare(kOp, b.count(), *grad);
    const Terms terms = b.neurons.terms(b.count(), grad->scalar_type());
    if (b.recovers_u) {
      const MaybeTensor residual = b.residual < 0 ? std::nullopt : values[b.residual];
      known[i] = {std::nullopt, values[number], terms.bias, residual};
    }
    const auto [dx, dw, dz, sums] = conv2d_backward(
        *grad, b.needs_weight ? values[b.x] : std::nullopt, sizes[b.x], b.weight,
        b.relu ? values[number] : std::nullopt, actives[i], known[i], b.neurons.mask, terms.scale,
        terms.shift, b.stride, b.padding, b.dilation, b.groups, need_x, b.needs_weight,
        need_residual && b.relu, b.needs_vectors(), b.algorithm, need_x ? grads[b.x] : std::nullopt,
        add_to_u);
    if (need_x) grads[b.x] = dx;
    if (need_residual && b.relu) add_to(b.residual, dz);
    if (b.needs_weight) results[region.inputs + b.first_part] = dw;
    if (!b.needs_vectors()) continue;
    const std::vector<Tensor> vectors = b.neurons.grads(sums, b.needs);
    for (int which = 0; which < kVectors; ++which)
      if (b.needs[which]) results[region.inputs + b.parts[which]] = vectors[which];
  }
  for (int64_t number = 0; number < region.inputs; ++number)
    if (region.wanted[number] && grads[number]) results[number] = *grads[number];
  return results;
}

}  // namespace mnp::ops
