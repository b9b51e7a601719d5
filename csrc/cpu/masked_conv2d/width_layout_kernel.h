// Between NCHW images and the width-vectorised layout: the rows of one image with padding between them. Nothing is
// transposed; with a stride of 2, pixels of even and of odd number go to rows of their own, and come back.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/capability.h"
#include "cpu/epilogue.h"

namespace sparse_adv {

// Where each row of a channel goes: `row_count` of them, from pixel `first_pixel` on, to these offsets, or nowhere if
// that is negative. Written are first the rows of zeros, then these in ascending order, so that what is written behind
// the end of a row may reach into the next one. Sizes, offsets and pitches in floats.
struct RowMap {
  int64_t row_size, last_row_size;  // of the images
  int64_t first_pixel, row_count;
  const int32_t* offsets;
  const int32_t* zero_offsets;
  int64_t zero_count;
  int64_t tile_row_size;   // written of each row, 0 beyond its end: a multiple of kLanes
  int64_t channel_pitch;   // from one channel of the tile to the next, which is written later
  int64_t odd_offset = 0;  // from a row of the tile to one that gets the pixels of odd number; 0: it has them itself
};

// Channel c of an image, `pixels` floats each, goes to tile + (c - channels.begin) * channel_pitch.
SPARSE_ADV_FOR_EACH_ISA(void fill_width_tile(const float* image, int64_t pixels, const RowMap& map, Range channels,
                                             float* tile));

// Computed rows of a band, which follow each other in a plane per output channel and output phase: those of channel k
// begin at plane_of[k] * channel_pitch, row phase by row phase, and within these column phase by column phase. Sizes
// and pitches in floats.
struct JoinedRows {
  const float* data;  // followed by a vector that may be read
  const int32_t* plane_of;
  int64_t channel_pitch, phase_pitch, row_pitch;
  int64_t row_phases, col_phases;  // columns have 1 or 2
  int64_t first_row, row_count;    // of the images; the first one is of row phase 0
  int64_t row_size;
  Range channels;  // to be written
};

// Writes to an image of `channels` channels, each `pixels` floats; residual and gates start at its first row.
SPARSE_ADV_FOR_EACH_ISA(void store_joined_rows(const JoinedRows& rows, const Epilogue<float>& epilogue,
                                               int64_t channels, int64_t pixels, float* image));

}  // namespace sparse_adv
