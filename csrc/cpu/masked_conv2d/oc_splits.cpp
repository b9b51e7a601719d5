#include "cpu/masked_conv2d/oc_splits.h"

#include <algorithm>

#include "common/rounding.h"

namespace sparse_adv {

namespace {

// A split has a multiple of this number of channels: one vector, and whole bytes of a gate.
constexpr int64_t kSplitChannels = 16;

}  // namespace

int64_t count_oc_splits(const BlockCsr& csr, int64_t threads) {
  const bool groups_are_padded = csr.group_out_channels % csr.oc_block != 0 && csr.groups > 1;
  if (groups_are_padded) return 1;
  return std::min(threads, divide_up(csr.oc_blocks * csr.oc_block, kSplitChannels));
}

Range oc_blocks_of_split(const BlockCsr& csr, int64_t splits, int64_t split) {
  const int64_t multiple = kSplitChannels / csr.oc_block, multiples = divide_up(csr.oc_blocks, multiple);
  return {.begin = split * multiples / splits * multiple,
          .end = std::min((split + 1) * multiples / splits * multiple, csr.oc_blocks)};
}

Range channels_of(const BlockCsr& csr, Range oc_blocks) {
  return {.begin = oc_blocks.begin * csr.oc_block,
          .end = std::min(oc_blocks.end * csr.oc_block, csr.groups * csr.group_out_channels)};
}

}  // namespace sparse_adv
