// Compiles a mask into the arrays that pattern_layout.h describes. Depends on neither torch nor Python.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/pattern_layout.h"

namespace sparse_adv {

struct CsrArrays {
  int64_t oc_block, ic_block;
  std::vector<int32_t> row_offsets, col_indices;
};

struct CompiledMask {
  std::array<int64_t, kHeaderSize> header;
  CsrArrays forward, grad_input;
};

// `mask` is bool [K, C/groups, R, S] with these sizes, contiguous. Throws std::invalid_argument where sizes, block or
// groups are out of range.
CompiledMask compile_mask(const uint8_t* mask, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& block,
                          int64_t groups);

}  // namespace sparse_adv
