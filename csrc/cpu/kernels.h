// The CPU kernels: raw pointers and sizes only, no torch. Each instruction set has a table of them.
//
// Images are NHWC: element (n, h, w, c) lies at ((n * H + h) * W + w) * C + c. A "pixel" is one
// (n, h, w); work is split over ranges [begin, end) so that the caller owns the threads.
#pragma once

#include <stdint.h>

#include "../kernel_types.h"

namespace mnp::cpu {

// Products that are added up one after the other at most: rounding stays within its bound then.
constexpr int64_t kLongestSum = 1024;

// y = act(mask * (scale * u + shift) + bias + residual), per neuron (the last axis).
template <class T>
struct Epilogue {
  const T* mask;        // [K], or [N][K] where mask_stride is K; null: y = act(u + residual)
  int64_t mask_stride;  // 0, or K
  const T* scale;       // [K]
  const T* shift;       // [K]
  const T* bias;        // [K]
  const T* residual;    // laid out as the output, or null
  T* u;                 // where u is kept for the backward, or null
  uint8_t* active;      // where is kept which outputs the ReLU let through, or null
  bool relu;
};

// The weight of output j, tap q and channel d is data[j * stride_j + q * stride_q + d * stride_d].
template <class T>
struct Weights {
  const T* data;
  int64_t stride_j, stride_q, stride_d;
  int64_t taps;
};

// Weights as a convolution reads them: panels of [tap][depth][lanes] outputs.
template <class T>
struct PackPanels {
  Weights<T> weights;    // of the first group
  int64_t stride_g;      // from a group's weights to the next group's
  const int64_t* place;  // [weights.taps] a tap's place in the panels, or -1 where it is left out
  int64_t taps;          // in the panels
  int64_t groups, depth, width;
};

// Output pixels of a convolution: out[p][j] = sum over taps q and channels d of
// input[p * step + tap q][d] * panel[q][d][j].
// A forward pass is one of these; a gradient of the input is one for each phase of the stride.
template <class T>
struct Direct {
  const T* input;  // NHWC, in_stride elements from a pixel to the next
  int64_t in_h, in_w, in_stride;
  int64_t first_row;  // among the rows of all samples, the one where `input` begins: direct_rows
  int64_t groups;
  int64_t depth;    // input channels of a group
  int64_t width;    // output channels of a group
  const T* panels;  // pack_panels
  // Of each output's weights there, how many there are and which is the first; as many are used as
  // there are taps and channels.
  int64_t panel_depth, panel_first;
  int64_t taps;
  const int64_t* tap_h;  // [taps] input row of a tap, relative to step_h * output row
  const int64_t* tap_w;
  int64_t rows, cols;      // output grid of one sample
  int64_t step_h, step_w;  // input pixels per output pixel
  T* output;               // NHWC, out_stride elements from a pixel to the next
  int64_t out_stride;
  int64_t out_h, out_w;                // output image; grid pixel (i, j) is at
  int64_t out_step_h, out_step_w;      // (out_origin_h + i * out_step_h,
  int64_t out_origin_h, out_origin_w;  //  out_origin_w + j * out_step_w)
  const Epilogue<T>* epilogue;         // never null
  int64_t l1, l2;                      // bytes of the first and second cache
};

// A 3x3 convolution with stride 1 or 2, the latter's transpose, or a 5x5 one with stride 1, in
// Winograd's tiles.
template <class T>
struct Winograd {
  const T* input;  // NHWC, in_stride elements from a pixel to the next
  int64_t batch, in_h, in_w, in_stride;
  int64_t in_depth, depth;  // channels that are transformed; those of them that are summed over
  int64_t padding_h, padding_w;    // may be negative: rows and columns that are not read
  int64_t dilation_h, dilation_w;  // 1 with stride 2
  const T* zeros;                  // in_depth zeros, read where a tile reaches outside the input
  T* output;                       // NHWC, out_stride elements from a pixel to the next
  int64_t out_h, out_w, out_stride, width;
  const Epilogue<T>* epilogue;  // never null
};

// How the gradient of its weights is computed: `chunk` tiles are transformed at a time, and a unit
// of work has the sums over them for `edge` neurons and `edge` input channels.
struct WinogradWeightPlan {
  int64_t tiles, chunk, units, edge;
  int64_t inputs, grads;    // elements of a chunk's transformed tiles
  int64_t sums, unit_size;  // matrices of a unit's sums, and their elements
};

template <class T>
struct WinogradWeightGrad {
  Winograd<T> conv;  // without output and epilogue; max(depth, width) zeros
  WinogradWeightPlan plan;
  const T* grad;  // NHWC, grad_stride elements from a pixel to the next
  int64_t grad_stride;
  T* weight_grad;  // [width][depth][3][3]
};

// dW[k][d][tap] = sum over output pixels of grad[p][k] * x[p at tap][d].
template <class T>
struct WeightGrad {
  const T* grad;        // NHWC (batch, rows, cols, groups * width)
  int64_t grad_stride;  // from a pixel to the next
  const T* input;       // NHWC
  int64_t batch, rows, cols;
  int64_t in_h, in_w, in_channels;
  int64_t groups, depth, width;
  int64_t taps;
  const int64_t* tap_h;
  const int64_t* tap_w;
  int64_t step_h, step_w;
  T* weight_grad;  // [groups * width][depth][taps]
  int64_t l2;      // bytes of the second cache
};

// The gradient of an image of few channels, NHWC without gaps, from that of its convolution.
template <class T>
struct ImageGrad {
  const T* grad;        // NHWC (batch, rows, cols, depth)
  int64_t grad_stride;  // from a pixel to the next
  int64_t batch, rows, cols, depth;
  const T* panels;  // pack_panels, of a product of `depth` with all taps' channels
  int64_t taps_h, taps_w, channels;
  int64_t in_h, in_w;
  int64_t step_h, step_w, padding_h, padding_w, dilation_h, dilation_w;
  const T* add;  // added to the gradient, or null
  T* output;
};

// The epilogue of images whose u is given for some neurons and is 0 for the others.
template <class T>
struct ExpandNeurons {
  NeuronLayout layout;    // channels last
  const int64_t* living;  // [count] the given ones
  int64_t count;
  const T* u;  // [batch * inner][count]
  const Epilogue<T>* epilogue;
  T* output;
};

// dz = dy * act'(z); g = dz * mask * scale + add_to_u; and per sample and neuron, summed over
// `inner`: sums[0] = dz, sums[1] = dz * (scale * u + shift), sums[2] = dz * u. Any output may be
// null. Where u was not kept, scale * u + shift is (z - bias - residual) / mask, and sums[2] stays
// 0.
template <class T>
struct EpilogueGrad {
  NeuronLayout layout;
  const T* grad;
  const T* y;             // the forward's output, or null
  const uint8_t* active;  // which of them the ReLU let through, or null
  const T* u;             // null when sums[1..2] are not wanted, or where there is z
  const T* z;             // the forward's output, channels last, in place of u, or null
  const T* mask;
  int64_t mask_stride;
  const T* scale;
  const T* shift;
  const T* bias;      // in z
  const T* residual;  // in z, laid out as it, or null
  const T* add_to_u;  // [neurons], or null
  T* dz;
  T* g;
  int64_t g_stride;  // channels last: from a pixel of g to the next
  T* sums;           // [3][batch][neurons]
};

// One row of weights a neuron.
struct NeuronRows {
  const void* weights;
  Element element;
  int64_t size, stride;  // elements of a row, and from one row to the next
  Norm norm;
  void* norms;      // of the rows; double for f64, else float
  int64_t columns;  // spectral: of a row as a row-major matrix, f32 or f64
};

template <class T>
struct MaskUpdate {
  T* mask;
  const T* grad;
  T* velocity;
  const T* magnitude;
  T lr, momentum, penalty;
};

// Matrices behind each other, [batch][rows][cols], and where they go, [batch][cols][rows].
template <class T>
struct Transpose {
  const T* from;
  T* to;
  int64_t batch, rows, cols;
};

template <class T>
struct WinogradKernels {
  // Tiles to transform and multiply together, so that they stay in a second cache of l2 bytes.
  int64_t (*block)(int64_t depth, int64_t l2);
  // Elements of one set's packed weights.
  int64_t (*set_size)(int64_t depth);
  // Packs one set's weights, turned by 180 degrees where `rotated`.
  void (*pack)(const Weights<T>&, bool rotated, int64_t depth, int64_t width, int64_t set,
               T* packed);
  int64_t (*tiles)(const Winograd<T>&);
  // Elements of the transformed inputs of so many tiles.
  int64_t (*input_size)(int64_t depth, int64_t tiles);
  // Transforms tiles [begin, end) into rows [row, ...) of a buffer for `tiles` tiles.
  void (*input)(const Winograd<T>&, int64_t begin, int64_t end, T* inputs, int64_t row,
                int64_t tiles);
  // Elements of scratch for the products of so many tiles.
  int64_t (*product_size)(int64_t tiles);
  // Writes one set's outputs of tiles [begin, end), whose inputs are at rows [row, ...).
  void (*output)(const Winograd<T>&, int64_t begin, int64_t end, const T* inputs, int64_t row,
                 int64_t tiles, int64_t set, const T* packed, T* products);
};

template <class T>
struct WinogradWeightKernels {
  // For a second cache of l2 bytes.
  WinogradWeightPlan (*plan)(const Winograd<T>&, int64_t l2);
  // Transforms tiles [begin, end), of which the buffers' first is `first`.
  void (*tiles)(const WinogradWeightGrad<T>&, int64_t begin, int64_t end, int64_t first, T* inputs,
                T* grads);
  // Sums [begin, end) of a unit, over the buffers' first `tiles`; added where `accumulate`.
  void (*sums)(const WinogradWeightGrad<T>&, int64_t unit, int64_t begin, int64_t end,
               int64_t tiles, const T* inputs, const T* grads, T* sums, bool accumulate);
  // A unit's gradients from its sums.
  void (*output)(const WinogradWeightGrad<T>&, int64_t unit, const T* sums);
};

template <class T>
struct Kernels {
  int64_t panel;  // outputs of a panel
  // Elements that pack_panels writes, and how many panels that are.
  int64_t (*panels_size)(const PackPanels<T>&);
  int64_t (*panels_count)(const PackPanels<T>&);
  // Panels [begin, end) of `panels`.
  void (*pack_panels)(const PackPanels<T>&, int64_t begin, int64_t end, T* panels);
  // Bytes of scratch that one direct call needs.
  int64_t (*direct_scratch)(const Direct<T>&);
  // Grid pixels [begin, end) of batch * rows * cols.
  void (*direct)(const Direct<T>&, int64_t begin, int64_t end, char* scratch);
  // Whether it has a kernel for these groups that uses most lanes of its vectors.
  bool (*fills_vectors)(const Direct<T>&);
  // The same for one group, where every tap reads a run of `depth` elements inside the image, from
  // column step_w * j on.
  void (*direct_rows)(const Direct<T>&, int64_t begin, int64_t end);
  // Elements of scratch for so many rows of an image's gradient, and rows [begin, end) of
  // batch * in_h.
  int64_t (*image_grad_scratch)(const ImageGrad<T>&, int64_t rows);
  void (*image_grad)(const ImageGrad<T>&, int64_t begin, int64_t end, T* scratch);
  // Gradients of groups [begin, end) where depth and width are 1.
  void (*depthwise_weight_grad)(const WeightGrad<T>&, int64_t begin, int64_t end);
  // Independent units of work of a weight gradient, elements of scratch for so many, and units
  // [begin, end).
  int64_t (*weight_grad_units)(const WeightGrad<T>&);
  int64_t (*weight_grad_scratch)(const WeightGrad<T>&, int64_t units);
  void (*weight_grad)(const WeightGrad<T>&, int64_t begin, int64_t end, T* scratch);
  // A distance between rows of so many elements at which they do not share cache sets.
  int64_t (*row_stride)(int64_t size);
  // Rows [begin, end): batch * inner of channels_last layouts, batch * neurons of others.
  void (*epilogue_forward)(const NeuronLayout&, const Epilogue<T>&, const T* u, T* y, int64_t begin,
                           int64_t end);
  // Elements of scratch that one expand_neurons call needs, and pixels [begin, end).
  int64_t (*expand_scratch)(int64_t neurons);
  void (*expand_neurons)(const ExpandNeurons<T>&, int64_t begin, int64_t end, T* scratch);
  // Samples [begin, end) for neurons [first, last).
  void (*epilogue_grad)(const EpilogueGrad<T>&, int64_t begin, int64_t end, int64_t first,
                        int64_t last);
  // Independent strips of a transpose, and strips [begin, end).
  int64_t (*transpose_strips)(const Transpose<T>&);
  void (*transpose)(const Transpose<T>&, int64_t begin, int64_t end);
  // Elements [begin, end).
  void (*mask_update)(const MaskUpdate<T>&, int64_t begin, int64_t end);
  // Sets of output channels that Winograd multiplies together.
  int64_t (*winograd_sets)(int64_t width);
  WinogradKernels<T> winograd2, winograd2_whole, winograd4, winograd2_of_5, winograd2_stride2,
      winograd2_stride2_grad, winograd4_stride2, winograd4_stride2_grad;
  WinogradWeightKernels<T> winograd2_weight, winograd4_weight, winograd4_stride2_weight;
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  // Rows [begin, end). The scratch has as many bytes as `magnitude_scratch` says.
  void (*magnitude)(const NeuronRows&, int64_t begin, int64_t end, void* scratch);
  int64_t (*magnitude_scratch)(const NeuronRows&);
};

}  // namespace mnp::cpu
