// The arithmetic of the forward pass and of grad_input: one tile of output pixels, all output channels.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// Lists as in pattern_layout.h, with entries turned into offsets into the window.
struct OffsetLists {
  int64_t vector, vectors, segments;
  const int32_t* rows;     // [vectors * segments + 1]
  const int32_t* offsets;  // in floats, from the tile's first pixel
  const float* values;     // [offsets * vector]
};

// A tile of kTilePixels pixels, `tile_cols` (16, 8 or 4) of them in a row.
//   tile[(vector index * vector + j) * kTilePixels + q] = sum over the list of value[j] * window[offset + pixel q]
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_tile(const OffsetLists& lists, const float* window, int64_t row_pitch,
                                                int tile_cols, float* tile));

}  // namespace sparse_adv
