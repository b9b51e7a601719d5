// From NCHW images to the width-vectorised layout: the rows of one image with padding between them. Nothing is
// transposed.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace sparse_adv {

// `row_count` rows of each channel, from pixel `first_pixel` on, become rows tile_row, tile_row + 1 ... of the tile.
// Sizes and pitches in floats.
struct RowMap {
  int64_t row_size, last_row_size;  // of the images
  int64_t first_pixel, row_count, tile_row;
  int64_t tile_rows;                 // those that have no row of the image become 0
  int64_t tile_row_size;             // written of each row, 0 beyond row_size: a multiple of kLanes
  int64_t row_pitch, channel_pitch;  // from one row, one channel of the tile to the next
};

// Channel c of an image, `pixels` floats each, goes to tile + (c - first_channel) * channel_pitch.
SPARSE_ADV_FOR_EACH_ISA(void fill_width_tile(const float* image, int64_t pixels, const RowMap& map,
                                             int64_t first_channel, int64_t last_channel, float* tile));

}  // namespace sparse_adv
