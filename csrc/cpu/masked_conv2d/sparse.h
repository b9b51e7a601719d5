// The sparse kernel of the forward pass and of grad_input: threads, bands, slices and tiles around the arithmetic of
// conv_kernel.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/epilogue.h"
#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/packing.h"

namespace sparse_adv {

struct SparseConv {
  BlockCsr csr;
  WeightLayout weight;
  const Blocking& blocking;
  const torch::stable::Tensor& source;  // the images that the pass reads, in a plain layout
  Epilogue<float> epilogue;             // its residual in the layout of the output
};

// Writes output [N, groups * group_out_channels, ...], which has the layout of the source (layouts_agree).
void run_sparse_conv(const SparseConv& conv, torch::stable::Tensor& output);

}  // namespace sparse_adv
