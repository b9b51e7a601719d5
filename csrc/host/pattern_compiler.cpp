#include "host/pattern_compiler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "common/rounding.h"

namespace sparse_adv {

namespace {

// The mask as CSR, with a row per output channel: row k has the column indices col_indices[row_offsets[k]] up to
// col_indices[row_offsets[k + 1] - 1], in which input channels are numbered within their group.
struct MaskCsr {
  std::vector<int32_t> row_offsets{0}, col_indices;

  MaskCsr(const uint8_t* mask, int64_t out_channels, int64_t in_channels, int64_t taps) {
    const int64_t row_size = in_channels * taps;
    // A table: a division by `taps` for each weight took half of the compiler's time.
    std::vector<int32_t> index_of(row_size);
    for (int64_t i = 0; i < row_size; ++i) index_of[i] = static_cast<int32_t>(i / taps << kTapBits | i % taps);
    col_indices.reserve(out_channels * row_size / 8);
    for (int64_t k = 0; k < out_channels; ++k) {
      const uint8_t* row = mask + k * row_size;
      for (int64_t i = 0; i < row_size; i += 8) {
        const int64_t end = std::min(row_size, i + 8);
        uint64_t eight = 0;
        std::memcpy(&eight, row + i, end - i);
        if (eight == 0) continue;
        for (int64_t j = i; j < end; ++j)
          if (row[j]) col_indices.push_back(index_of[j]);
      }
      if (std::ssize(col_indices) > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("mask keeps 2^31 weights or more, which row offsets cannot count");
      row_offsets.push_back(static_cast<int32_t>(col_indices.size()));
    }
  }
};

// The widest of 4, 2 and 1 channels that can be computed together: an oc_block must be part of one block of the mask
// and of one group.
int64_t choose_oc_block(int64_t mask_block, int64_t groups, int64_t group_out_channels) {
  for (int64_t oc_block : {4, 2})
    if (mask_block % oc_block == 0 && (groups == 1 || group_out_channels % oc_block == 0)) return oc_block;
  return 1;
}

// The number of channels of an ic_block, a power of 2:
// - large enough that a row has 7 column indices on average, which hides the time to load and store the accumulators
//   around them;
// - small enough that the part of the images that they read stays in the L1 cache: 16 to 64 channels for an oc_block of
//   1, up to 256 for one of 2, and 64 to 256 for one of 4, which is computed for 4 vectors at a time instead of 16.
// Measured at density 0.1 (docs/design/masked_conv2d_history.md): 256 channels at 8x8 take 7.5, 6.6, 7.3 and 8.7 ms
// with ic_blocks of 8, 16, 32 and 64 channels and oc_block 1; 512 at 4x4 take 5.2, 4.5 and 4.3 ms with 16, 32 and 64
// and oc_block 4.
int64_t choose_ic_block(int64_t kept_weights, int64_t out_channels, int64_t group_in_channels, int64_t oc_block) {
  const double per_channel =
      static_cast<double>(kept_weights) / static_cast<double>(std::max<int64_t>(out_channels * group_in_channels, 1));
  int64_t ic_block = oc_block == 4 ? 64 : 16;
  const int64_t limit = oc_block == 1 ? 64 : 256;
  while (ic_block < limit && static_cast<double>(ic_block) * per_channel < 7.0 * static_cast<double>(oc_block))
    ic_block *= 2;
  return ic_block;
}

struct FilterSize {
  int64_t rows, cols;
};

// A weight as a pass uses it.
struct PassWeight {
  int64_t out_channel, in_channel;  // that the pass writes and reads, each numbered within its group
  int32_t col_index;
};

// Sorts the weights kept by the mask into the rows of a pass, and there by filter row, by counting. `weight_of(k,
// index)` describes the weight of output channel k at column index `index` of `mask`. "out" and "in" are what the pass
// writes and reads.
template <class WeightOf>
CsrArrays build_csr(const MaskCsr& mask, FilterSize filter, int64_t groups, int64_t group_out_channels,
                    int64_t group_in_channels, int64_t oc_block, WeightOf weight_of) {
  const auto kept_weights = static_cast<int64_t>(mask.col_indices.size());
  const auto mask_rows = static_cast<int64_t>(mask.row_offsets.size()) - 1;
  CsrArrays csr{.oc_block = oc_block,
                .ic_block = choose_ic_block(kept_weights, group_out_channels * groups, group_in_channels, oc_block),
                .row_offsets = {},
                .col_indices = {}};
  const int64_t group_oc_blocks = divide_up(group_out_channels, oc_block);
  const int64_t ic_blocks = divide_up(group_in_channels, csr.ic_block);
  const int oc_bits = std::countr_zero(static_cast<uint64_t>(oc_block));
  const int ic_bits = std::countr_zero(static_cast<uint64_t>(csr.ic_block));
  // The kernels need the order of filter rows only with an oc_block of 2 or 4 (Blocking::should_skip_padding).
  const int64_t places = oc_block > 1 ? filter.rows : 1;
  std::vector<int64_t> place_of(filter.rows * filter.cols);  // a table: a division for each weight would take longer
  for (int64_t tap = 0; oc_block > 1 && tap < std::ssize(place_of); ++tap) place_of[tap] = tap / filter.cols;
  auto for_each_index = [&](auto visit) {
    for (int64_t k = 0; k < mask_rows; ++k) {
      const int64_t group = k / (mask_rows / groups);
      for (int32_t i = mask.row_offsets[k]; i < mask.row_offsets[k + 1]; ++i) {
        const PassWeight weight = weight_of(k, mask.col_indices[i]);
        if (weight.out_channel & (oc_block - 1)) continue;  // the first channel stands for the whole oc_block
        const int64_t oc_number = group * group_oc_blocks + (weight.out_channel >> oc_bits);
        const int64_t row = (weight.in_channel >> ic_bits) * group_oc_blocks * groups + oc_number;
        visit(row * places + place_of[weight.col_index & (kMaxTaps - 1)], weight.col_index);
      }
    }
  };
  const int64_t rows = ic_blocks * group_oc_blocks * groups;
  std::vector<int32_t> next(rows * places + 1);
  for_each_index([&](int64_t at, int32_t) { ++next[at + 1]; });
  for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
  for (int64_t row = 0; row <= rows; ++row) csr.row_offsets.push_back(next[row * places]);
  csr.col_indices.resize(csr.row_offsets.back());
  for_each_index([&](int64_t at, int32_t col_index) { csr.col_indices[next[at]++] = col_index; });
  return csr;
}

}  // namespace

CompiledMask compile_mask(const uint8_t* mask, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& block,
                          int64_t groups) {
  const int64_t out_channels = sizes[0], in_channels = sizes[1], taps = sizes[2] * sizes[3];
  if (groups < 1 || out_channels % groups != 0) throw std::invalid_argument("groups must divide the mask's rows");
  if (std::ranges::any_of(block, [](int64_t size) { return size < 1; }))
    throw std::invalid_argument("block sizes must be positive");
  if (taps > kMaxTaps || out_channels > kMaxChannels || in_channels * groups > kMaxChannels)
    throw std::invalid_argument("mask is too large");
  const int64_t group_out = out_channels / groups;
  const MaskCsr mask_csr(mask, out_channels, in_channels, taps);
  CompiledMask compiled{};
  const FilterSize filter{.rows = sizes[2], .cols = sizes[3]};
  compiled.forward =
      build_csr(mask_csr, filter, groups, group_out, in_channels, choose_oc_block(block[0], groups, group_out),
                [&](int64_t k, int32_t index) -> PassWeight {
                  const int64_t first_channel = k / group_out * in_channels;  // of the group, in the images
                  return {.out_channel = k % group_out,
                          .in_channel = index >> kTapBits,
                          .col_index = static_cast<int32_t>(index + (first_channel << kTapBits))};
                });
  compiled.grad_input =
      build_csr(mask_csr, filter, groups, in_channels, group_out, choose_oc_block(block[1], groups, in_channels),
                [&](int64_t k, int32_t index) -> PassWeight {
                  const auto tap = static_cast<int32_t>(index & (kMaxTaps - 1));
                  return {.out_channel = index >> kTapBits,
                          .in_channel = k % group_out,
                          .col_index = static_cast<int32_t>(k << kTapBits) | tap};
                });

  auto& header = compiled.header;
  header[kFormat] = kPatternFormat;
  header[kOutChannels] = out_channels;
  header[kGroupInChannels] = in_channels;
  header[kFilterRows] = sizes[2];
  header[kFilterCols] = sizes[3];
  header[kGroups] = groups;
  std::ranges::copy(block, header.begin() + kBlockOut);
  header[kKeptWeights] = static_cast<int64_t>(mask_csr.col_indices.size());
  header[kOcBlock] = compiled.forward.oc_block;
  header[kIcBlock] = compiled.forward.ic_block;
  header[kGradInputOcBlock] = compiled.grad_input.oc_block;
  header[kGradInputIcBlock] = compiled.grad_input.ic_block;
  return compiled;
}

}  // namespace sparse_adv
