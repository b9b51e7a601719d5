#include "cpu/masked_conv2d/pattern.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "common/errors.h"
#include "cpu/masked_conv2d/col_indices_kernel.h"

namespace sparse_adv {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* int32_data(const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.is_contiguous(),
        "pattern: rows and entries must be contiguous one-dimensional int32 tensors on the CPU");
  return tensor.const_data_ptr<int32_t>();
}

// `channels` and `taps` bound what an entry may name; `group_rows` and `group_channels` fix the number of lists.
PatternLists read_lists(const std::vector<Tensor>& tensors, int rows_at, int values_at, int64_t vector,
                        int64_t segment_channels, int64_t groups, int64_t group_rows, int64_t group_channels,
                        int64_t taps) {
  check(vector == 1 || vector == 2 || vector == 4, "pattern: vector must be 1, 2 or 4, not ", vector);
  PatternLists lists{};
  lists.vector = vector;
  lists.segment_channels = segment_channels;
  lists.vectors = (group_rows + vector - 1) / vector * groups;
  lists.segments = (group_channels + segment_channels - 1) / segment_channels;
  const Tensor& rows = tensors[rows_at];
  const Tensor& entries = tensors[rows_at + 1];
  lists.rows = int32_data(rows);
  lists.entries = int32_data(entries);
  lists.entry_count = entries.numel();
  const int64_t list_count = lists.vectors * lists.segments;
  check(rows.numel() == list_count + 1, "pattern: ", rows.numel(), " list starts where ", list_count + 1, " belong");
  check(lists.rows[0] == 0 && lists.rows[list_count] == lists.entry_count,
        "pattern: the lists do not span the entries");
  bool ascending = true;
  for (int64_t i = 0; i < list_count; ++i) ascending &= lists.rows[i] <= lists.rows[i + 1];
  check(ascending, "pattern: list starts must not descend");
  // The channel bound is the image's: an entry names channels of all groups.
  bool inside = SPARSE_ADV_CHOOSE(entries_inside)(lists.entries, lists.entry_count, group_channels * groups, taps);
  if (groups > 1)
    for (int64_t list = 0; list < list_count; ++list) {
      const int64_t group = list % lists.vectors / (lists.vectors / groups);
      for (int32_t i = lists.rows[list]; i < lists.rows[list + 1]; ++i)
        inside &= (lists.entries[i] >> kTapBits) / group_channels == group;
    }
  check(inside, "pattern: an entry lies outside the weight or its group");
  if (tensors.size() > static_cast<size_t>(values_at)) {
    const Tensor& values = tensors[values_at];
    check(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
              values.numel() == lists.entry_count * vector,
          "pattern: packed values must be ", lists.entry_count * vector, " contiguous float32 numbers");
    lists.values = values.const_data_ptr<float>();
  }
  return lists;
}

// Marks the lists of a mask whose blocks span the rows of a filter with three columns.
PatternLists with_rows_of_three(PatternLists lists, int64_t block_cols, int64_t filter_cols) {
  lists.rows_of_three = lists.vector == 1 && filter_cols == 3 && block_cols % 3 == 0;
  if (lists.rows_of_three) {
    bool whole = true;
    for (int64_t i = 0; i <= lists.vectors * lists.segments; ++i) whole &= lists.rows[i] % 3 == 0;
    check(whole && SPARSE_ADV_CHOOSE(entries_in_threes)(lists.entries, lists.entry_count),
          "pattern: the block spans rows of the filter, and the entries do not");
  }
  return lists;
}

}  // namespace

PatternLists Pattern::forward() const {
  const int64_t* header = tensors[kHeader].const_data_ptr<int64_t>();
  return with_rows_of_three(read_lists(tensors, kRows, kValues, forward_vector, forward_segment, groups,
                                       group_out_channels(), group_in_channels, taps()),
                            header[kBlockCols], filter_cols);
}

PatternLists Pattern::grad_input() const {
  const int64_t* header = tensors[kHeader].const_data_ptr<int64_t>();
  return with_rows_of_three(read_lists(tensors, kGradInputRows, kGradInputValues, grad_input_vector, grad_input_segment,
                                       groups, group_in_channels, group_out_channels(), taps()),
                            header[kBlockCols], filter_cols);
}

Pattern read_pattern(const std::vector<Tensor>& tensors) {
  check(tensors.size() == kGradInputEntries + 1 || tensors.size() == kGradInputValues + 1,
        "pattern: expected 6 tensors, or 8 with packed values, got ", tensors.size());
  const Tensor& header_tensor = tensors[kHeader];
  check(header_tensor.is_cpu() && header_tensor.scalar_type() == ScalarType::Long && header_tensor.is_contiguous() &&
            header_tensor.numel() == kHeaderSize,
        "pattern: the header must be ", static_cast<int>(kHeaderSize), " int64 numbers on the CPU");
  const int64_t* header = header_tensor.const_data_ptr<int64_t>();
  check(header[kFormat] == kPatternFormat, "pattern: format ", header[kFormat], ", this library reads ",
        kPatternFormat);
  for (int field = kOutChannels; field <= kGroups; ++field)
    check(header[field] >= (field == kGroups) && header[field] <= kMaxChannels, "pattern: header field ", field,
          " is out of range");
  Pattern pattern{};
  pattern.out_channels = header[kOutChannels];
  pattern.group_in_channels = header[kGroupInChannels];
  pattern.filter_rows = header[kFilterRows];
  pattern.filter_cols = header[kFilterCols];
  pattern.groups = header[kGroups];
  pattern.kept = header[kKept];
  pattern.forward_vector = header[kVector];
  pattern.grad_input_vector = header[kGradInputVector];
  pattern.forward_segment = header[kSegmentChannels];
  pattern.grad_input_segment = header[kGradInputSegmentChannels];
  pattern.weight_is_masked = header[kWeightIsMasked] == 1;
  for (const int64_t segment : {pattern.forward_segment, pattern.grad_input_segment})
    check(segment >= 1 && segment <= kMaxChannels, "pattern: segments of ", segment, " channels");
  check(
      pattern.out_channels % pattern.groups == 0 && pattern.in_channels() <= kMaxChannels && pattern.taps() <= kMaxTaps,
      "pattern: the header's sizes do not fit together");
  std::copy_n(header + kForwardKernel, 3, pattern.requested_kernel);
  pattern.mask = tensors[kMask];
  check(pattern.mask.is_cpu() && pattern.mask.scalar_type() == ScalarType::Bool && pattern.mask.dim() == 4 &&
            pattern.mask.size(0) == pattern.out_channels && pattern.mask.size(1) == pattern.group_in_channels &&
            pattern.mask.size(2) == pattern.filter_rows && pattern.mask.size(3) == pattern.filter_cols,
        "pattern: the mask's shape differs from the header's");
  pattern.tensors = tensors;
  return pattern;
}

}  // namespace sparse_adv
