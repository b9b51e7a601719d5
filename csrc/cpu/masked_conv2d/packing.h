// The lists of a pattern where a window and a weight are known: entries as offsets, values, orders, and back.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/pattern.h"

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

// The kept values in the order of the lists.
void pack_values(const PatternLists& lists, int64_t groups, int64_t group_rows, const WeightLayout& weight,
                 float* values);

// Adds totals [parts, entries, vector] over the parts and writes them to their places, entry i from place[i] if there
// is a `place`, in a contiguous weight gradient, and 0 everywhere else. Returns whether all sums are finite.
bool unpack_totals(const PatternLists& lists, int64_t groups, int64_t group_rows, const WeightLayout& weight,
                   const float* totals, int64_t parts, const int32_t* place, float* to);

// The entries of each list in the order of the columns that they read, see Columns::by_column.
struct ColumnOrder {
  std::vector<int32_t> turns;
  std::unique_ptr<int32_t[]> place;  // of each entry
  ColumnOrder(const PatternLists& lists, const Window& window);
};

// The entries as offsets into the window, in floats, where all taps are of one output phase.
std::unique_ptr<int32_t[]> window_offsets(const PatternLists& lists, const Window& window);

// The output channel of each row of each vector; -1 beyond the end of a group.
std::vector<int32_t> channels_of_rows(const PatternLists& lists, int64_t groups, int64_t group_rows);

// The segments of the lists whose channels the window holds as one block.
struct Segments {
  int64_t first, last;
};
Segments segments_of_block(const PatternLists& lists, const Window& window, int64_t first_channel);

}  // namespace sparse_adv
