#include <algorithm>

#include "conv.h"
#include "image.h"
#include "masked_conv2d.h"
#include "passes.h"
#include "region.h"
#include "share.h"

namespace mnp::ops {
namespace {

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
  check_vector(kRegion, "the gradient of means", grad, sizes[1], grad, grad.scalar_type());
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
  check_like(kRegion, "the gradient of a residual", a, b);
  const Tensor left = channels_last_image(a), right = channels_last_image(b);
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

// What a slice of the samples comes to.
struct Made {
  std::vector<Tensor> outputs, kept;
};

Made forward(const Region& region, const std::vector<Tensor>& inputs, const Ints& outputs) {
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
  Made made;
  for (const int64_t output : outputs)
    made.outputs.push_back(output < region.values() ? *values[output]
                                                    : *means[output - region.values()]);
  made.kept = std::move(kept_u);
  for (int64_t number = region.inputs; number < region.values(); ++number)
    if (region.kept[number]) made.kept.push_back(*values[number]);
  made.kept.insert(made.kept.end(), kept_active.begin(), kept_active.end());
  return made;
}

// Tensors of one slice, in the order in which the forward has kept them.
struct Kept {
  std::vector<MaybeTensor> values, actives;
  std::vector<KnownU> known;

  Kept(const Region& region, const Tensor* next)
      : values(region.values()), actives(region.blocks.size()), known(region.blocks.size()) {
    for (size_t i = 0; i < region.blocks.size(); ++i)
      if (region.needs_u(region.blocks[i])) {
        if (!region.blocks[i].recovers_u) known[i].u = *next;
        ++next;
      }
    for (int64_t number = region.inputs; number < region.values(); ++number)
      if (region.kept[number]) values[number] = *next++;
    for (size_t i = 0; i < region.blocks.size(); ++i)
      if (region.keeps_active(region.blocks[i])) actives[i] = *next++;
  }
  // How many of u, and of all.
  static int64_t first_values(const Region& region) {
    return std::count_if(region.blocks.begin(), region.blocks.end(), Region::needs_u);
  }
  static int64_t count(const Region& region) {
    int64_t count = std::count(region.kept.begin() + region.inputs, region.kept.end(), true);
    for (const Block& b : region.blocks) count += region.needs_u(b) + region.keeps_active(b);
    return count;
  }
};

// Gradients of inputs and parts from those of values; `add_to_u` has, of each block, that of every
// pixel of u by its mean.
std::vector<Tensor> backward(const Region& region, std::vector<MaybeTensor> grads, Kept state,
                             const std::vector<MaybeTensor>& add_to_u,
                             const std::vector<Ints>& sizes, size_t count) {
  const auto add_to = [&](int64_t value, const Tensor& grad) {
    grads[value] = grads[value] ? sum_of(*grads[value], grad) : grad;
  };
  std::vector<Tensor> results(count);
  for (int64_t i = static_cast<int64_t>(region.blocks.size()); i-- > 0;) {
    const Block& b = region.blocks[i];
    const int64_t number = region.output_of(b);
    MaybeTensor grad = std::move(grads[number]);
    grads[number].reset();
    if (!region.wanted[number]) continue;
    if (add_to_u[i] && !grad)
      grad = torch::stable::full(sizes[number], 0, add_to_u[i]->scalar_type());
    if (!grad) continue;
    const bool need_x = region.wanted[b.x];
    const bool need_residual = b.residual >= 0 && region.wanted[b.residual];
    if (need_residual && !b.relu) add_to(b.residual, *grad);
    const Terms terms = b.neurons.terms(b.count(), grad->scalar_type());
    if (b.recovers_u) {
      const MaybeTensor residual = b.residual < 0 ? std::nullopt : state.values[b.residual];
      state.known[i] = {std::nullopt, state.values[number], terms.bias, residual};
    }
    const auto [dx, dw, dz, sums] = conv2d_backward(
        *grad, b.needs_weight ? state.values[b.x] : std::nullopt, sizes[b.x], b.weight,
        b.relu ? state.values[number] : std::nullopt, state.actives[i], state.known[i],
        b.neurons.mask, terms.scale, terms.shift, b.stride, b.padding, b.dilation, b.groups, need_x,
        b.needs_weight, need_residual && b.relu, b.needs_vectors(), b.algorithm,
        need_x ? grads[b.x] : std::nullopt, add_to_u[i]);
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

// Into how many slices of its samples a region is cut, each of which one thread computes through
// all blocks. Blocks of little work take less time so: no thread waits for others after each, or
// reads what they wrote.
int64_t slices_of(const Region& region, const std::vector<Ints>& sizes, ScalarType type) {
  constexpr int64_t kFewest = 4;                // samples
  constexpr int64_t kLeast = int64_t{1} << 20;  // multiply-adds of a thread, in all blocks
  constexpr int64_t kPerWeight = 64;            // of these, since each thread reads all weights
  constexpr int64_t kMost = int64_t{1} << 26;   // on average in one block
  const int64_t batch = sizes[0][0], count = static_cast<int64_t>(region.blocks.size());
  const int64_t slices = threads();
  if (slices == 1 || batch < kFewest * slices || count == 0) return 1;
  int64_t products = 0, weights = 0;
  for (const Block& b : region.blocks) {
    const Conv conv(kRegion, sizes[b.x], b.weight, b.stride, b.padding, b.dilation, b.groups);
    const Algorithm chosen = choose_algorithm(kRegion, conv, b.algorithm, type, Result::output);
    if (conv.n != batch || b.needs_weight || chosen == Algorithm::torch) return 1;
    products += conv.n * conv.oh * conv.ow * conv.k * conv.group_in() * conv.taps();
    weights += b.weight.numel();
  }
  const int64_t each = products / slices;
  const bool pays = each >= kLeast && each >= kPerWeight * weights && each / count <= kMost;
  return pays ? slices : 1;
}

// A cut of the samples. Tensors are cut where torch knows the thread: before the loop over slices.
class Slices {
 public:
  Slices(int64_t batch, int64_t count) : batch_(batch), count_(count) {}
  int64_t count() const { return count_; }
  int64_t samples(int64_t slice) const { return first(slice + 1) - first(slice); }
  Tensor take(Tensor samples_of_all, int64_t slice) const {
    if (count_ == 1) return samples_of_all;
    return torch::stable::narrow(samples_of_all, 0, first(slice), samples(slice));
  }
  // The region with the slice's rows of masks that have one for each sample.
  Region take(Region region, int64_t slice) const {
    for (Block& b : region.blocks)
      if (b.masks_samples()) b.neurons.mask = take(b.neurons.mask, slice);
    return region;
  }
  // What the slices' images or rows are written to; with one slice, that is its tensor itself.
  Tensor whole(const Ints& sizes, ScalarType type) const {
    if (count_ == 1) return Tensor();
    return sizes.size() == 4 ? empty_image(sizes, type) : empty(sizes, type);
  }
  void put(const Tensor& part, int64_t slice, Tensor& whole) const {
    if (count_ == 1) {
      whole = part;
      return;
    }
    with_type(part.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const int64_t sample = whole.numel() / batch_;
      std::copy_n(data<T>(part), part.numel(), mutable_data<T>(whole) + first(slice) * sample);
    });
  }

 private:
  int64_t batch_, count_;
  int64_t first(int64_t slice) const { return slice * batch_ / count_; }
};

// Adds a multiple of a vector to a sum, which is undefined before the first one.
void add_vector(const Tensor& vector, double factor, Tensor& sum) {
  if (!sum.defined()) sum = torch::stable::full(sizes_of(vector), 0, vector.scalar_type());
  with_type(vector.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const from = data<T>(vector);
    T* const to = mutable_data<T>(sum);
    for (int64_t i = 0; i < vector.numel(); ++i) to[i] += static_cast<T>(factor * from[i]);
  });
}

}  // namespace

std::vector<Tensor> region_forward(const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& parts, const Ints& plan,
                                   const std::vector<double>& eps, const Names& algorithms,
                                   const Ints& outputs, const Ints& needed) {
  Region region(static_cast<int64_t>(inputs.size()), parts, plan, eps, algorithms, outputs, needed);
  MNP_CHECK(!inputs.empty(), kRegion, ": inputs must have an image");
  std::vector<Ints> of_inputs;
  for (const Tensor& x : inputs) {
    MNP_CHECK(compute_type(kRegion, x) == x.scalar_type(), kRegion,
              ": inputs must be float32 or float64");
    of_inputs.push_back(sizes_of(x));
  }
  const std::vector<Ints> sizes = region.sizes(std::move(of_inputs));
  const int64_t batch = sizes[0][0];
  const ScalarType type = inputs[0].scalar_type();
  for (Block& b : region.blocks) {
    b.neurons.prepare(kRegion, b.count(), batch, inputs[0]);
    region.set_recovers_u(b, region.can_recover_u(b));
  }
  const Slices slices(batch, slices_of(region, sizes, type));
  std::vector<std::vector<Tensor>> images(slices.count());
  std::vector<Region> regions;
  for (int64_t s = 0; s < slices.count(); ++s) {
    for (const Tensor& x : inputs) images[s].push_back(slices.take(channels_last_image(x), s));
    regions.push_back(slices.take(region, s));
  }
  const auto is_mean = [&](size_t i) { return outputs[i] >= region.values(); };
  std::vector<Tensor> results(outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i)
    if (!is_mean(i)) results[i] = slices.whole(sizes[outputs[i]], type);
  std::vector<Made> made(slices.count());
  each_alone(slices.count(), [&](int64_t s) {
    made[s] = forward(regions[s], images[s], outputs);
    for (size_t i = 0; i < outputs.size(); ++i)
      if (!is_mean(i)) slices.put(made[s].outputs[i], s, results[i]);
  });
  for (int64_t s = 0; s < slices.count(); ++s) {
    const double share = static_cast<double>(slices.samples(s)) / batch;
    for (size_t i = 0; i < outputs.size(); ++i)
      if (is_mean(i)) add_vector(made[s].outputs[i], share, results[i]);
  }
  for (const Made& m : made) results.insert(results.end(), m.kept.begin(), m.kept.end());
  return results;
}

std::vector<Tensor> region_backward(const std::vector<MaybeTensor>& given,
                                    const std::vector<Tensor>& kept,
                                    const std::vector<Tensor>& parts, const Ints& plan,
                                    const std::vector<double>& eps, const Names& algorithms,
                                    const Ints& outputs, const Ints& needed,
                                    const Ints& input_sizes) {
  MNP_CHECK(given.size() == outputs.size() && input_sizes.size() % 4 == 0 && !input_sizes.empty(),
            kRegion, ": grads must be one an output, and sizes four an input");
  Region region(static_cast<int64_t>(input_sizes.size()) / 4, parts, plan, eps, algorithms, outputs,
                needed);
  std::vector<Ints> of_inputs;
  for (auto size = input_sizes.begin(); size != input_sizes.end(); size += 4)
    of_inputs.emplace_back(size, size + 4);
  const std::vector<Ints> sizes = region.sizes(std::move(of_inputs));
  const int64_t batch = sizes[0][0];

  const int64_t kept_inputs = region.kept_inputs(), all = static_cast<int64_t>(kept.size());
  MNP_CHECK(all >= kept_inputs + Kept::first_values(region), kRegion, ": kept is too short");
  const Tensor* const first = kept.data() + kept_inputs;
  const Tensor* u = first;
  for (Block& b : region.blocks)
    // Where u is recovered, the forward has put nothing in its place.
    if (region.needs_u(b)) region.set_recovers_u(b, (u++)->dim() != 4);
  const int64_t each = Kept::count(region);
  const Slices slices(batch, each > 0 ? (all - kept_inputs) / each : 1);
  MNP_CHECK(all == kept_inputs + each * slices.count() && slices.count() >= 1 &&
                (slices.count() == 1 || (kept_inputs == 0 && slices.count() <= batch)),
            kRegion, ": kept is not what the forward returned");

  const Tensor* like = nullptr;
  std::vector<MaybeTensor> grads(region.values()), add_to_u(region.blocks.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!given[i]) continue;
    like = &*given[i];
    const int64_t block = outputs[i] - region.values();
    if (block >= 0) {
      add_to_u[block] = gradient_of_means(*like, sizes[region.inputs + block]);
      continue;
    }
    MNP_CHECK(sizes_of(*like) == sizes[outputs[i]], kRegion, ": a gradient must have shape ",
              shape_of(sizes[outputs[i]]), ", not ", shape_of(*like));
    grads[outputs[i]] = channels_last_image(*like);
  }
  std::vector<Tensor> results(needed.size());
  if (!like) return results;
  for (Block& b : region.blocks) b.neurons.prepare(kRegion, b.count(), batch, *like);

  std::vector<std::vector<MaybeTensor>> grads_of(slices.count());
  std::vector<std::vector<Ints>> slice_sizes(slices.count(), sizes);
  std::vector<Region> regions;
  for (int64_t s = 0; s < slices.count(); ++s) {
    for (const MaybeTensor& grad : grads)
      grads_of[s].push_back(grad ? MaybeTensor(slices.take(*grad, s)) : std::nullopt);
    if (slices.count() > 1)
      for (Ints& size : slice_sizes[s]) size[0] = slices.samples(s);
    regions.push_back(slices.take(region, s));
  }
  // Gradients with a row for each sample: those of inputs, and of masks that have one.
  std::vector<int64_t> by_sample;
  const auto add_by_sample = [&](int64_t i, const Ints& size) {
    by_sample.push_back(i), results[i] = slices.whole(size, like->scalar_type());
  };
  for (int64_t i = 0; i < region.inputs; ++i)
    if (region.wanted[i]) add_by_sample(i, sizes[i]);
  for (const Block& b : region.blocks)
    if (b.masks_samples() && b.needs[kMask])
      add_by_sample(region.inputs + b.parts[kMask], {batch, b.count()});
  std::vector<std::vector<Tensor>> made(slices.count());
  each_alone(slices.count(), [&](int64_t s) {
    Kept state(region, first + s * each);
    int64_t next = 0;
    for (int64_t i = 0; i < region.inputs; ++i)
      if (region.kept[i]) state.values[i] = kept[next++];
    made[s] = backward(regions[s], std::move(grads_of[s]), std::move(state), add_to_u,
                       slice_sizes[s], results.size());
    for (const int64_t i : by_sample)
      if (made[s][i].defined()) slices.put(made[s][i], s, results[i]);
  });
  if (slices.count() == 1) return made[0];
  for (const int64_t i : by_sample) {
    if (!made[0][i].defined()) results[i] = Tensor();
    for (std::vector<Tensor>& of_slice : made) of_slice[i] = Tensor();
  }
  for (size_t i = 0; i < results.size(); ++i)
    for (const std::vector<Tensor>& of_slice : made)
      if (of_slice[i].defined()) add_vector(of_slice[i], 1, results[i]);
  return results;
}

}  // namespace mnp::ops
