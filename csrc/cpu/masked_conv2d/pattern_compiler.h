// Compiles a mask into the index lists that pattern_layout.h describes; neither torch nor Python is needed.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/masked_conv2d/pattern_layout.h"

namespace sparse_adv {

struct Lists {
  int64_t vector, segment_channels;
  std::vector<int32_t> rows, entries;
};

struct CompiledMask {
  std::array<int64_t, kHeaderSize> header;
  Lists forward, grad_input;
};

// `mask` is bool [K, C/groups, R, S], of these sizes, in memory order. Throws std::invalid_argument where sizes, block
// or groups are out of range.
CompiledMask compile_mask(const uint8_t* mask, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& block,
                          int64_t groups);

}  // namespace sparse_adv
