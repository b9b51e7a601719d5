// The arithmetic of the forward pass and of grad_input: one tile of output pixels, all output channels.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// What is known of the columns that entries read:
// - threes: each three consecutive entries are three neighbouring columns, vectors or pixels;
// - by_column: lane = pixel, tiles hold whole rows, and entries read the column before a position, then the position
//   itself, then the column after it; of each list `turns` says at which entries these begin.
enum class Columns { any, threes_of_vectors, threes_of_pixels, by_column };

// Lists as in pattern_layout.h, with entries turned into offsets into the window.
struct OffsetLists {
  int64_t vector, vectors, segments;
  const int32_t* rows;     // [vectors * segments + 1]
  const int32_t* offsets;  // in floats, from the tile's first vector
  const float* values;     // [offsets * vector]
  Columns columns;
  const int32_t* turns;  // by_column: [vectors * segments * 2], from the list's start
};

constexpr int kTileVectors = 16;  // computed together, whatever the instruction set

// What follows the sum: out = relu(scale[k] * sum + bias[k] + residual). Null pointers leave their part out.
struct Epilogue {
  const float* scale;
  const float* bias;
  const float* residual;  // laid out as the output
  bool relu;
};

// Where the sums of a tile go whose lanes are pixels, once all segments are in. At the tile's first pixel, in floats.
struct TileOutput {
  float* data;                // of channel 0
  int64_t row_pitch, plane;   // from one row of the image, one channel to the next
  int64_t rows, cols;         // how many of the tile's pixels lie in the image
  const int32_t* channel_of;  // [vectors * vector]: the output channel of each row of a vector, -1 beyond the last
  Epilogue epilogue;          // its residual at the tile's first pixel of channel 0
};

// A tile of kTileVectors vectors, `cols` (1, 2, 4, 8 or 16) of them in a row of the window. All strides in floats.
struct Tile {
  int cols;
  const float* window;  // at the tile's first vector
  int64_t window_row_pitch;
  float* sums;  // at the tile's first vector, one plane per row of a vector
  int64_t sums_row_pitch, sums_plane;
  const TileOutput* output;  // null: the sums stay where they are
};

// sums[i * vector + j][pixel] = sum over list i of values[j] * window[offset + pixel], over the lists of the segments
// from `first_segment` on; segment 0 starts the sums, the others add to them, the last one ends them.
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_tile(const OffsetLists& lists, int64_t first_segment, int64_t last_segment,
                                                const Tile& tile));

}  // namespace sparse_adv
