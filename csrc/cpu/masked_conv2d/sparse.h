// The forward pass and grad_input over the kept weights: threads, strips and tiles around the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/masked_conv2d/batch_layout_kernel.h"
#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/packing.h"

namespace sparse_adv {

struct SparsePass {
  PatternLists lists;
  int64_t groups, group_rows;  // output channels per group
  WeightLayout weight;
  const Window& window;
  const torch::stable::Tensor& source;  // in a plain layout
  Epilogue epilogue;                    // its residual in the layout of `output`
};

// Writes output [N, groups * group_rows, ...], which has the source's layout.
void run(const SparsePass& pass, torch::stable::Tensor& output);

}  // namespace sparse_adv
