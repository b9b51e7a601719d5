// The arithmetic of the forward pass and of grad_input: one tile of positions, a range of the output channels.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/capability.h"
#include "cpu/epilogue.h"

namespace sparse_adv {

// The order of the column indices of a row, which the kernel may rely on:
// - batch_triples, width_triples: every three consecutive ones are the three taps of a filter row, which read three
//   neighbouring columns of the input tile; batch-vectorised a column is a vector, width-vectorised it is a lane.
// - by_column: width-vectorised, and the tile has whole rows. The column indices are sorted by column offset: first
//   those that read the column before a position (-1), then the position itself (0), then the column after it (+1).
enum class IndexOrder { any, batch_triples, width_triples, by_column };

// The weights of a pass (BlockCsr in pattern.h), with the column indices as offsets into the input tile.
struct PackedWeights {
  int64_t oc_block, oc_blocks, ic_blocks;
  const int32_t* row_offsets;    // [ic_blocks * oc_blocks + 1]
  const int32_t* input_offsets;  // [nnz], in floats, from the tile's first vector
  const float* values;           // [nnz, oc_block]
  IndexOrder order;
  const int32_t* column_splits;  // by_column: of each row, where column offsets 0 and +1 begin, from the row's start
  // Null, or [rows of the matrix, filter_rows + 1]: where the column indices of each filter row begin, from the row's
  // start.
  const int32_t* filter_row_starts = nullptr;
  int64_t filter_rows = 0;
};

// The filter rows [begin, end) of which a row of positions reads pixels: at the top and at the bottom of an image the
// others read padding.
struct FilterRows {
  int32_t begin, end;
};

constexpr int kTileVectors = 16;  // computed together, on every instruction set

// Where a width-vectorised tile writes its results after the last ic_block. In floats, from the tile's first pixel.
struct OutputRegion {
  float* data;                       // of channel 0
  int64_t row_pitch, channel_pitch;  // from one row of the image, one channel to the next
  int64_t rows, cols;                // of the band, from the tile's first pixel on
  int64_t first_col;                 // of the image, where the tile begins
  int64_t gate_channel_pitch;        // bytes from one channel of a gate to the next
  const int32_t* channel_of;         // [oc_blocks * oc_block]: the output channel, -1 beyond the end of a group
  Epilogue<float> epilogue;  // its residual from the tile's first pixel of channel 0, its gates from the row of it
};

// A tile of kTileVectors vectors, `cols` (1, 2, 4, 8 or 16) of them per row. All pitches in floats.
struct ConvTile {
  int cols;
  int64_t rows_inside, cols_inside;  // the others are beyond the end of the images, and blocks of them are left out
  const float* input;                // at the tile's first vector
  int64_t input_row_pitch;
  float* accumulators;  // at the tile's first vector, a plane per output channel
  int64_t acc_row_pitch, acc_channel_pitch;
  const OutputRegion* output;               // null: the results stay in the accumulators
  Range oc_blocks;                          // those that are computed
  const FilterRows* filter_rows = nullptr;  // of each row inside, with filter_row_starts: others may be left out
};

// The kernel computes a tile in blocks of this size, and leaves out those that lie beyond the end of the images. So the
// rows and columns that it computes are rows_inside and cols_inside, rounded up to multiples of these.
struct RegisterBlock {
  int rows, cols;
};
SPARSE_ADV_FOR_EACH_ISA(RegisterBlock register_block_of_tile(int tile_cols, int64_t oc_block));

// For each row of the matrix that belongs to `ic_blocks` and to the tile's oc_blocks, and each channel j of its
// oc_block:
//   accumulators[oc_block number * oc_block + j][position] += sum_i values[i][j] * input[input_offsets[i] + position]
// ic_block 0 starts from 0; after the last ic_block of the matrix the results go to `output`, if there is one.
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_tile(const PackedWeights& weights, Range ic_blocks, const ConvTile& tile));

}  // namespace sparse_adv
