// The filters of which a mask keeps weights: CSR matrices with the same indices for each element.
#pragma once

#include <cstdint>

namespace sparse_adv {

constexpr int kElements = 36;  // of a transformed filter

// A row for each `oc_block` consecutive output channels, 1, 2 or 4, a column for each input channel. Transformed values
// are stored as [kElements][count][oc_block]; those of output channels beyond the last one are 0.
struct LiveFilters {
  int64_t oc_block, oc_blocks;
  const int32_t* row_offsets;  // [oc_blocks + 1]
  const int32_t* channels;     // [count]
  int64_t count;
};

}  // namespace sparse_adv
