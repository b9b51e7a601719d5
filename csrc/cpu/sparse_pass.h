// The forward pass and grad_input over the kept weights: threads, strips and tiles around the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/sample_lanes_kernel.h"
#include "cpu/window.h"
#include "cpu/window_lists.h"

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

// The images of an item of the window's work, from a tensor in a plain layout.
Images images_of(const torch::stable::Tensor& tensor, const Window& window, int64_t item);

}  // namespace sparse_adv
