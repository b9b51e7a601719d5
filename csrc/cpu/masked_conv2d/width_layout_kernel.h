// Between NCHW images and the width-vectorised layout: the rows of one image with padding between them. Nothing is
// transposed.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/epilogue.h"

namespace sparse_adv {

// `row_count` rows of each channel, from pixel `first_pixel` on, become rows tile_row, tile_row + 1 ... of the tile.
// Sizes and pitches in floats.
struct RowMap {
  int64_t row_size, last_row_size;  // of the images
  int64_t first_pixel, row_count, tile_row;
  int64_t tile_rows;                 // those that have no row of the image become 0
  int64_t tile_row_size;             // written of each row, 0 beyond row_size: a multiple of kLanes
  int64_t row_pitch, channel_pitch;  // from one row, one channel of the tile to the next, which is written later
};

// Channel c of an image, `pixels` floats each, goes to tile + (c - first_channel) * channel_pitch.
SPARSE_ADV_FOR_EACH_ISA(void fill_width_tile(const float* image, int64_t pixels, const RowMap& map,
                                             int64_t first_channel, int64_t last_channel, float* tile));

// Computed rows of a band, which follow each other in a plane per output channel: that of channel k is number
// plane_of[k]. Sizes and pitches in floats.
struct JoinedRows {
  const float* data;  // followed by a vector that may be read
  const int32_t* plane_of;
  int64_t channel_pitch, row_pitch;
  int64_t first_row, row_count;  // of the images
  int64_t row_size;
  int64_t first_channel, last_channel;  // to be written, up to last_channel - 1
};

// Writes to an image of `channels` channels, each `pixels` floats; residual and gates start at its first row.
SPARSE_ADV_FOR_EACH_ISA(void store_joined_rows(const JoinedRows& rows, const Epilogue<float>& epilogue,
                                               int64_t channels, int64_t pixels, float* image));

}  // namespace sparse_adv
