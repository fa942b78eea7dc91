#include "block.h"
#include "conv.h"
#include "image.h"
#include "masked_conv2d.h"

namespace mnp::ops {
namespace {

const char* const kOp = "mnp_fast region";

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

// The blocks, and what of them takes gradients.
struct Region {
  int64_t inputs;
  std::vector<Block> blocks;
  std::vector<char> wanted;  // of each value, whether it takes gradients
  std::vector<char> read;    // of each value, whether the gradient of a weight reads it

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
    read.assign(inputs + eps.size(), false);
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
      if (b.needs_weight) read[b.x] = true;
      wanted.push_back(wanted[b.x] || (b.residual >= 0 && wanted[b.residual]) || b.needs_weight ||
                       b.needs_vectors());
      blocks.push_back(std::move(b));
    }
    numbers.finish(), parts.finish();
    for (const int64_t output : outputs)
      MNP_CHECK(output >= 0 && output < static_cast<int64_t>(wanted.size()), kOp,
                ": there is no value ", output);
  }

  int64_t values() const { return inputs + static_cast<int64_t>(blocks.size()); }
  int64_t output_of(const Block& b) const { return inputs + (&b - blocks.data()); }
  // What a block keeps for the backward. The activity of a ReLU, a byte an element, is all that it
  // needs of an output that no gradient of a weight reads.
  static bool keeps_u(const Block& b) { return b.needs[kMask] || b.needs[kNormWeight]; }
  bool keeps_active(const Block& b) const {
    return b.relu && wanted[output_of(b)] && !read[output_of(b)];
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
  std::vector<int64_t> last = region.last_reads();
  std::vector<char> stays = region.read;
  for (const int64_t output : outputs) stays[output] = true;
  std::vector<MaybeTensor> values(inputs.begin(), inputs.end());
  std::vector<Tensor> kept_u, kept_active;
  for (size_t i = 0; i < region.blocks.size(); ++i) {
    Block& b = region.blocks[i];
    const int64_t neurons = b.weight.dim() > 0 ? b.weight.size(0) : 0;
    const Tensor& x = *values[b.x];
    b.neurons.prepare(kOp, neurons, x);
    const Terms terms = b.neurons.terms(neurons, x.scalar_type());
    const bool keep_u = region.keeps_u(b), keep_active = region.keeps_active(b);
    auto [y, u, active] =
        conv2d_forward(x, b.weight, b.neurons.mask, terms.scale, terms.shift, terms.bias,
                       b.residual < 0 ? std::nullopt : values[b.residual], b.stride, b.padding,
                       b.dilation, b.groups, b.activation(), keep_u, keep_active, b.algorithm);
    values.emplace_back(std::move(y));
    if (keep_u) kept_u.push_back(std::move(u));
    if (keep_active) kept_active.push_back(std::move(active));
    for (const int64_t number : {b.x, b.residual})
      if (number >= 0 && last[number] == static_cast<int64_t>(i) && !stays[number])
        values[number].reset();
  }
  std::vector<Tensor> results;
  for (const int64_t output : outputs) results.push_back(*values[output]);
  for (int64_t number = region.inputs; number < region.values(); ++number)
    if (region.read[number]) results.push_back(*values[number]);
  results.insert(results.end(), kept_u.begin(), kept_u.end());
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
  std::vector<MaybeTensor> values(region.values()), us(count), actives(count);
  for (int64_t number = 0; number < region.values(); ++number)
    if (region.read[number]) values[number] = state.next();
  for (int64_t i = 0; i < count; ++i)
    if (region.keeps_u(region.blocks[i])) us[i] = state.next();
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

  std::vector<MaybeTensor> grads(region.values());
  for (size_t i = 0; i < outputs.size(); ++i) grads[outputs[i]] = given[i];
  const auto add_to = [&](int64_t value, const Tensor& grad) {
    grads[value] = grads[value] ? sum_of(*grads[value], grad) : grad;
  };
  std::vector<Tensor> results(region.inputs + static_cast<int64_t>(parts.size()));
  for (int64_t i = count; i-- > 0;) {
    Block& b = region.blocks[i];
    const int64_t number = region.output_of(b), neurons = b.weight.size(0);
    const MaybeTensor grad = std::move(grads[number]);
    grads[number].reset();
    if (!grad || !region.wanted[number]) continue;
    const bool need_x = region.wanted[b.x];
    const bool need_residual = b.residual >= 0 && region.wanted[b.residual];
    if (need_residual && !b.relu) add_to(b.residual, *grad);
    b.neurons.prepare(kOp, neurons, *grad);
    const Terms terms = b.neurons.terms(neurons, grad->scalar_type());
    const auto [dx, dw, dz, sums] =
        conv2d_backward(*grad, b.needs_weight ? values[b.x] : std::nullopt, sizes[b.x], b.weight,
                        b.relu ? values[number] : std::nullopt, actives[i], us[i], b.neurons.mask,
                        terms.scale, terms.shift, b.stride, b.padding, b.dilation, b.groups, need_x,
                        b.needs_weight, need_residual && b.relu, b.needs_vectors(), b.algorithm,
                        need_x ? grads[b.x] : std::nullopt);
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
