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

constexpr int kTilePixels = 16;  // output pixels computed together, whatever the instruction set

// A tile of kTilePixels pixels, `cols` (16, 8 or 4) of them in a row. All strides in floats.
struct Tile {
  int cols;
  const float* window;  // at the tile's first pixel
  int64_t window_row_pitch;
  float* sums;  // at the tile's first pixel, one plane per row of a vector
  int64_t sums_row_pitch, sums_plane;
};

// sums[i * vector + j][pixel] = sum over list i of values[j] * window[offset + pixel]
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_tile(const OffsetLists& lists, const Tile& tile));

}  // namespace sparse_adv
