// Which vector layout and which tile a pass of the sparse kernel takes: those of the least cost.
#pragma once

#include <cstdint>

#include "cpu/masked_conv2d/conv_axis.h"

namespace sparse_adv {

// What the blocking of a pass depends on, in addition to the geometry of the two axes.
struct PassSizes {
  int64_t batch, source_channels, output_channels;
  int64_t kept_weights;
  int64_t oc_block;
  int64_t ic_block;    // slices are multiples of it; 0: one slice, for grouped convolutions (ic_blocks are per group)
  bool channels_last;  // the layout of the images
  bool whole_tiles;    // all vectors of a tile are computed, also those beyond the end of the images
  bool gated;          // the epilogue reads or writes a gate, whose rows are padded to bytes
};

// The lanes of a vector are either batch-vectorised, one pixel of as many images as there are lanes
// (batch_layout_kernel.h), or width-vectorised, neighbouring positions of one image (width_layout_kernel.h), for NCHW
// images only. Width-vectorised are
// - rows: each row of the image begins with a vector of its own. At unit stride only.
// - joined_rows: the rows of a band follow each other, with as many zeros in between as the taps reach across the ends
//   of two rows, and count as one row; those of each source phase and of each output phase for themselves. Columns have
//   two phases at most. The accumulators stay in the scratch memory until the band is computed.
// - segments: for 1x1 filters without padding, which do not see where a row ends. An image counts as one row of all its
//   pixels that is cut into segments of at most a tile: `rows` are then the segments and `cols` the pixels of one. The
//   last segment may be shorter.
enum class Layout { batch, rows, joined_rows, segments };

struct LayoutChoice {
  Layout layout;
  int tile_cols;                   // vectors of a tile per row
  int64_t segment = 0;             // segments: pixels of one
  int64_t joined_pitch = 0;        // joined_rows: from one row of a phase to the next, in floats
  int64_t row_vectors_inside = 0;  // vectors of a row that have positions of the images
  int64_t plane_vectors = 0;       // vectors that are computed of a channel, of one batch block
};

LayoutChoice choose_layout(const ConvAxis& rows, const ConvAxis& cols, const PassSizes& sizes, int lanes,
                           bool width_vectors_allowed);

}  // namespace sparse_adv
