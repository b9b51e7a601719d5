// A compiled pattern as the ops read it: checked views of the tensors that pattern_layout.h describes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/masked_conv2d/pattern_layout.h"

namespace sparse_adv {

struct PatternLists {
  int64_t vector, segment_channels;
  int64_t vectors, segments;  // lists number vectors * segments
  const int32_t* rows;
  const int32_t* entries;
  int64_t entry_count;
  const float* values;  // [entry_count * vector], or null: read them from the weight
  bool rows_of_three;   // the entries come in threes: all taps of a filter's row
};

struct Pattern {
  int64_t out_channels, group_in_channels, filter_rows, filter_cols, groups, kept;
  int64_t forward_vector, grad_input_vector;
  int64_t forward_segment, grad_input_segment;  // channels
  int64_t requested_kernel[3];                  // of forward, grad_input, grad_weight: a Kernel
  bool weight_is_masked;
  torch::stable::Tensor mask;

  int64_t group_out_channels() const { return out_channels / groups; }
  int64_t in_channels() const { return group_in_channels * groups; }
  int64_t taps() const { return filter_rows * filter_cols; }

  // The lists of the forward pass and grad_weight, and those of grad_input. Throw std::runtime_error where an index
  // would lead out of bounds.
  PatternLists forward() const;
  PatternLists grad_input() const;

  std::vector<torch::stable::Tensor> tensors;
};

// Throws std::runtime_error where the tensors are no pattern.
Pattern read_pattern(const std::vector<torch::stable::Tensor>& tensors);

}  // namespace sparse_adv
