// Blocks that follow each other in a network, as operators are given them; see ops.h.
#pragma once

#include <algorithm>

#include "block.h"

namespace mnp::ops {

inline constexpr const char* kRegion = "mnp_fast region";  // in messages

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
  bool masks_samples() const { return neurons.mask.dim() == 2; }  // each with its own row
  bool needs_vectors() const { return needs[0] || needs[1] || needs[2] || needs[3]; }
  const char* activation() const { return relu ? "relu" : "none"; }
};

// The blocks, what of them takes gradients, and what the backward needs.
struct Region {
  int64_t inputs;
  std::vector<Block> blocks;
  std::vector<char> wanted;    // of each value, whether it takes gradients
  std::vector<char> returned;  // and whether the caller gets it, who may change it in place
  std::vector<char> kept;      // and whether the backward reads it
  std::vector<char> averaged;  // of each block, whether the caller gets the mean of u

  Region(int64_t inputs, const std::vector<Tensor>& parts, const Ints& plan,
         const std::vector<double>& eps, const Names& algorithms, const Ints& outputs,
         const Ints& needed);

  int64_t values() const { return inputs + static_cast<int64_t>(blocks.size()); }
  int64_t kept_inputs() const { return std::count(kept.begin(), kept.begin() + inputs, true); }
  int64_t output_of(const Block& b) const { return inputs + (&b - blocks.data()); }
  static bool needs_u(const Block& b) { return b.needs[kMask] || b.needs[kNormWeight]; }
  // Whether the backward can do with the output, and with the residual where there is one.
  bool can_recover_u(const Block& b) const;
  void set_recovers_u(Block& b, bool recovers);
  // The activity of a ReLU, a byte an element, where the output is not kept.
  bool keeps_active(const Block& b) const;
  // Of each value the last block that reads it, -1 if none does.
  std::vector<int64_t> last_reads() const;
  // Sizes of all values, from those of the inputs.
  std::vector<Ints> sizes(std::vector<Ints> of_inputs) const;
};

}  // namespace mnp::ops
