// The weights as the kernels read them, made on each call from the pattern, the blocking and the weight: column indices
// as offsets into the input tile, values, and their order. Also the scatter of weight gradients.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "common/parallel.h"
#include "common/range.h"
#include "cpu/masked_conv2d/blocking.h"
#include "cpu/masked_conv2d/pattern.h"

namespace sparse_adv {

// Where a weight tensor has the value of (output channel, input channel, tap) of a pass, in elements. In
// grad_input the weight's input and output channels have exchanged their roles.
struct WeightLayout {
  bool exchanged;
  const float* data;
  int64_t out_stride, in_stride;
  int64_t group_stride;  // added per group: output channels count within their group, input channels across groups
  std::vector<int64_t> tap_offset;

  static WeightLayout forward(const torch::stable::Tensor& weight, const Pattern& pattern);
  static WeightLayout grad_input(const torch::stable::Tensor& weight);
};

// The weights kept by the mask in the order of the column indices, [nnz, oc_block]; 0 beyond the end of a group.
// `scale` has a factor for each output channel of the weight, or is null.
void pack_values(const BlockCsr& csr, const WeightLayout& weight, const float* scale, float* values);

// Sums partials [partial_count, nnz, oc_block] over the first axis and scatters the sums to a contiguous weight
// gradient, which is 0 where the mask is false. The sum of column index i is at order[i], if there is an `order`, else
// at i. Returns whether all sums are finite.
bool scatter_weight_gradient(const BlockCsr& csr, const WeightLayout& weight, const float* partials,
                             int64_t partial_count, const int32_t* order, float* grad_weight);

// The column indices of each row in the order of IndexOrder::by_column.
struct ColumnOrder {
  std::vector<int32_t> column_splits;
  std::unique_ptr<int32_t[]> order;  // [nnz]: new index of column index i
  ColumnOrder(const BlockCsr& csr, const Blocking& blocking);
};

// The column indices by the output phase of their tap, those of each phase row by row: phase p has a matrix of its own,
// whose row offsets begin at row_offsets[p * rows].
struct PhaseOrder {
  std::vector<int32_t> row_offsets;  // [phases * rows + 1]
  std::unique_ptr<int32_t[]> order;  // [nnz]: new index of column index i
  PhaseOrder(const BlockCsr& csr, const Blocking& blocking);
};

// What belongs to the column indices, `block` numbers each, in a new order: that of index i moves to index order[i].
template <class T>
std::unique_ptr<T[]> reordered(const T* from, const int32_t* order, int64_t count, int64_t block) {
  auto to = std::make_unique_for_overwrite<T[]>(count * block);
  parallel_for(0, count, kElementwiseGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < block; ++j) to[order[i] * block + j] = from[i * block + j];
  });
  return to;
}

// The column indices as offsets into the input tile, in floats.
std::unique_ptr<int32_t[]> input_offsets(const BlockCsr& csr, const Blocking& blocking);

// PackedWeights::filter_row_starts; empty if the column indices are not sorted by filter row.
std::vector<int32_t> filter_row_starts(const BlockCsr& csr, const Blocking& blocking);

// The output channels in whole oc_blocks, of which the last one of a group may extend beyond its last channel.
struct OutputChannels {
  std::vector<int32_t> channel_of;  // [oc_blocks * oc_block]: -1 beyond the end of a group
  std::vector<int32_t> plane_of;    // the inverse: where channel_of has an output channel
  explicit OutputChannels(const BlockCsr& csr);
};

// The ic_blocks of the slice that starts at `first_channel`.
Range ic_blocks_of_slice(const BlockCsr& csr, const Blocking& blocking, int64_t first_channel);

}  // namespace sparse_adv
