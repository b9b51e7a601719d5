// A compiled pattern as the ops read it: checked views of the tensors that pattern_layout.h describes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/pattern_layout.h"
#include "cpu/epilogue_tensors.h"

namespace sparse_adv {

// The weights of one pass as a block-CSR matrix. "Output" channels are those that the pass writes: of grad_input they
// are the input channels of the convolution.
struct BlockCsr {
  int64_t groups, group_out_channels;
  int64_t oc_block, ic_block;    // channels per block
  int64_t oc_blocks, ic_blocks;  // number of blocks
  const int32_t* row_offsets;    // [rows() + 1]
  const int32_t* col_indices;    // [nnz]
  int64_t nnz;
  const float* values;      // [nnz, oc_block], or null: read them from the weight
  bool filter_row_triples;  // every three consecutive column indices are the three taps of a filter row

  int64_t rows() const { return oc_blocks * ic_blocks; }
};

struct Pattern {
  int64_t out_channels, group_in_channels, filter_rows, filter_cols, groups;
  int64_t kept_weights;  // number of true elements of the mask
  int64_t forward_oc_block, grad_input_oc_block;
  int64_t forward_ic_block, grad_input_ic_block;
  int64_t requested_kernel[3];  // a Kernel each for forward, grad_input, grad_weight
  bool weight_is_masked;
  torch::stable::Tensor mask;

  int64_t group_out_channels() const { return out_channels / groups; }
  int64_t in_channels() const { return group_in_channels * groups; }
  int64_t taps() const { return filter_rows * filter_cols; }

  // The matrix of the forward pass and grad_weight, and that of grad_input. Throw std::runtime_error if an index is out
  // of bounds.
  BlockCsr forward_csr() const;
  BlockCsr grad_input_csr() const;

  std::vector<torch::stable::Tensor> tensors;
};

// Throws std::runtime_error where the tensors are not a pattern.
Pattern read_pattern(const std::vector<torch::stable::Tensor>& tensors);

// Throws if out or gate_out shares memory with a tensor of the pattern: a list that changes after its checks would lead
// the kernels out of bounds.
void check_is_not_written(const Pattern& pattern, const torch::stable::Tensor& out, const EpilogueTensors& epilogue);

}  // namespace sparse_adv
