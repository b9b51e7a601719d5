#include "cpu/masked_conv2d/pattern.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>

#include "common/errors.h"
#include "common/rounding.h"
#include "cpu/masked_conv2d/col_indices_kernel.h"

namespace sparse_adv {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* int32_data(const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.is_contiguous(),
        "pattern: row offsets and column indices must be contiguous one-dimensional int32 tensors on the CPU");
  return tensor.const_data_ptr<int32_t>();
}

// What a matrix must fit: the channels per group that the pass writes and reads, and the taps of the filter.
struct CsrBounds {
  int64_t groups, group_out_channels, group_in_channels, taps;
};

void check_row_offsets(const BlockCsr& csr, const Tensor& row_offsets) {
  check(row_offsets.numel() == csr.rows() + 1, "pattern: ", row_offsets.numel(), " row offsets, expected ",
        csr.rows() + 1);
  check(csr.row_offsets[0] == 0 && csr.row_offsets[csr.rows()] == csr.nnz,
        "pattern: the row offsets do not span the column indices");
  bool ascending = true;
  for (int64_t row = 0; row < csr.rows(); ++row) ascending &= csr.row_offsets[row] <= csr.row_offsets[row + 1];
  check(ascending, "pattern: row offsets must not descend");
}

void check_col_indices(const BlockCsr& csr, const CsrBounds& bounds) {
  // A column index counts channels across groups.
  bool inside = SPARSE_ADV_CHOOSE(col_indices_inside)(csr.col_indices, csr.nnz,
                                                      bounds.group_in_channels * bounds.groups, bounds.taps);
  if (bounds.groups > 1)
    for (int64_t row = 0; row < csr.rows(); ++row) {
      const int64_t group = row % csr.oc_blocks / (csr.oc_blocks / bounds.groups);
      const int64_t first = group * bounds.group_in_channels, last = first + bounds.group_in_channels;
      for (int32_t i = csr.row_offsets[row]; i < csr.row_offsets[row + 1]; ++i) {
        const int64_t channel = csr.col_indices[i] >> kTapBits;  // compared: a division would take longer
        inside &= channel >= first && channel < last;
      }
    }
  check(inside, "pattern: a column index is outside the weight or its group");
}

BlockCsr read_csr(const std::vector<Tensor>& tensors, int row_offsets_at, int values_at, int64_t oc_block,
                  int64_t ic_block, const CsrBounds& bounds) {
  const Tensor& row_offsets = tensors[row_offsets_at];
  const Tensor& col_indices = tensors[row_offsets_at + 1];
  BlockCsr csr{.groups = bounds.groups,
               .group_out_channels = bounds.group_out_channels,
               .oc_block = oc_block,
               .ic_block = ic_block,
               .oc_blocks = divide_up(bounds.group_out_channels, oc_block) * bounds.groups,
               .ic_blocks = divide_up(bounds.group_in_channels, ic_block),
               .row_offsets = int32_data(row_offsets),
               .col_indices = int32_data(col_indices),
               .nnz = col_indices.numel(),
               .values = nullptr,
               .filter_row_triples = false};
  check_row_offsets(csr, row_offsets);
  check_col_indices(csr, bounds);
  if (tensors.size() > static_cast<size_t>(values_at)) {
    const Tensor& values = tensors[values_at];
    check(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
              values.numel() == csr.nnz * oc_block,
          "pattern: packed values must be ", csr.nnz * oc_block, " contiguous float32 numbers");
    csr.values = values.const_data_ptr<float>();
  }
  return csr;
}

// Marks the matrix of a mask whose blocks span the rows of a filter with three columns.
BlockCsr with_filter_row_triples(BlockCsr csr, int64_t mask_block_cols, int64_t filter_cols) {
  csr.filter_row_triples = csr.oc_block == 1 && filter_cols == 3 && mask_block_cols % 3 == 0;
  if (csr.filter_row_triples) {
    bool whole = true;
    for (int64_t row = 0; row <= csr.rows(); ++row) whole &= csr.row_offsets[row] % 3 == 0;
    check(whole && SPARSE_ADV_CHOOSE(col_indices_in_triples)(csr.col_indices, csr.nnz),
          "pattern: the block spans rows of the filter, but the column indices do not come in whole filter rows");
  }
  return csr;
}

}  // namespace

BlockCsr Pattern::forward_csr() const {
  const int64_t* header = tensors[kHeader].const_data_ptr<int64_t>();
  return with_filter_row_triples(read_csr(tensors, kRowOffsets, kValues, forward_oc_block, forward_ic_block,
                                          {groups, group_out_channels(), group_in_channels, taps()}),
                                 header[kBlockCols], filter_cols);
}

BlockCsr Pattern::grad_input_csr() const {
  const int64_t* header = tensors[kHeader].const_data_ptr<int64_t>();
  return with_filter_row_triples(
      read_csr(tensors, kGradInputRowOffsets, kGradInputValues, grad_input_oc_block, grad_input_ic_block,
               {groups, group_in_channels, group_out_channels(), taps()}),
      header[kBlockCols], filter_cols);
}

Pattern read_pattern(const std::vector<Tensor>& tensors) {
  check(tensors.size() == kGradInputColIndices + 1 || tensors.size() == kGradInputValues + 1,
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
  pattern.kept_weights = header[kKeptWeights];
  pattern.forward_oc_block = header[kOcBlock];
  pattern.grad_input_oc_block = header[kGradInputOcBlock];
  pattern.forward_ic_block = header[kIcBlock];
  pattern.grad_input_ic_block = header[kGradInputIcBlock];
  pattern.weight_is_masked = header[kWeightIsMasked] == 1;
  for (const int64_t oc_block : {pattern.forward_oc_block, pattern.grad_input_oc_block})
    check(oc_block == 1 || oc_block == 2 || oc_block == 4, "pattern: oc_block must be 1, 2 or 4, got ", oc_block);
  for (const int64_t ic_block : {pattern.forward_ic_block, pattern.grad_input_ic_block})
    check(ic_block >= 1 && ic_block <= kMaxChannels && std::has_single_bit(static_cast<uint64_t>(ic_block)),
          "pattern: ic_block must be a power of 2 from 1 to ", kMaxChannels, ", got ", ic_block);
  check(
      pattern.out_channels % pattern.groups == 0 && pattern.in_channels() <= kMaxChannels && pattern.taps() <= kMaxTaps,
      "pattern: the header's sizes do not fit together");
  check(pattern.kept_weights >= 0 &&
            pattern.kept_weights <= pattern.out_channels * pattern.group_in_channels * pattern.taps(),
        "pattern: the header counts ", pattern.kept_weights, " kept weights, more than the mask has or less than 0");
  std::copy_n(header + kForwardKernel, 3, pattern.requested_kernel);
  pattern.mask = tensors[kMask];
  check(pattern.mask.is_cpu() && pattern.mask.scalar_type() == ScalarType::Bool && pattern.mask.dim() == 4 &&
            pattern.mask.size(0) == pattern.out_channels && pattern.mask.size(1) == pattern.group_in_channels &&
            pattern.mask.size(2) == pattern.filter_rows && pattern.mask.size(3) == pattern.filter_cols,
        "pattern: the mask's shape differs from the header's");
  pattern.tensors = tensors;
  return pattern;
}

void check_is_not_written(const Pattern& pattern, const Tensor& out, const EpilogueTensors& epilogue) {
  constexpr const char* kNames[] = {"the pattern's header",
                                    "the pattern's mask",
                                    "the pattern's row_offsets",
                                    "the pattern's col_indices",
                                    "the pattern's grad_input_row_offsets",
                                    "the pattern's grad_input_col_indices",
                                    "the pattern's values",
                                    "the pattern's grad_input_values"};
  for (size_t i = 0; i < pattern.tensors.size(); ++i)
    check_is_not_written(kNames[i], pattern.tensors[i], out, epilogue);
}

}  // namespace sparse_adv
