// The forward pass and grad_input over the kept weights: threads, strips and tiles around the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "cpu/pattern.h"
#include "cpu/sample_lanes_kernel.h"
#include "cpu/window.h"

namespace sparse_adv {

// Where a weight keeps the value of (row that the pass writes, channel that it reads, tap), in elements.
struct WeightLayout {
  const float* data;
  int64_t row_stride, channel_stride;
  int64_t group_stride;  // added per group, since rows are numbered within their group and channels across groups
  std::vector<int64_t> tap_offset;

  static WeightLayout forward(const torch::stable::Tensor& weight, const Pattern& pattern);
  static WeightLayout grad_input(const torch::stable::Tensor& weight);
};

struct SparsePass {
  PatternLists lists;
  int64_t groups, group_rows;  // output channels per group
  WeightLayout weight;
  Window window;
  const torch::stable::Tensor& source;  // in a plain layout
  Epilogue epilogue;                    // its residual in the layout of `output`
};

// Writes output [N, groups * group_rows, ...], which has the source's layout.
void run(const SparsePass& pass, torch::stable::Tensor& output);

// The kept values in the order of the lists.
void pack_values(const PatternLists& lists, int64_t groups, int64_t group_rows, const WeightLayout& weight,
                 float* values);

// Adds totals [parts, entries, vector] over the parts and writes them to their places in a contiguous weight gradient,
// and 0 everywhere else. Returns whether all sums are finite.
bool unpack_totals(const PatternLists& lists, int64_t groups, int64_t group_rows, const WeightLayout& weight,
                   const float* totals, int64_t parts, float* to);

// The entries as offsets into the window, in floats, where all taps are of one output phase.
std::unique_ptr<int32_t[]> window_offsets(const PatternLists& lists, const Window& window);

// The output channel of each row of each vector; -1 beyond the end of a group.
std::vector<int32_t> channels_of_rows(const PatternLists& lists, int64_t groups, int64_t group_rows);

// The segments of the lists whose channels the window holds as one block.
struct Segments {
  int64_t first, last;
};
Segments segments_of_block(const PatternLists& lists, const Window& window, int64_t first_channel);

// The images of an item of the window's work, from a tensor in a plain layout.
Images images_of(const torch::stable::Tensor& tensor, const Window& window, int64_t item);

}  // namespace sparse_adv
