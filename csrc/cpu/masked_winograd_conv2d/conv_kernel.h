// Convolutions with 3 x 3 filters and stride 1, of which whole filters are pruned, by Winograd's filtering with tiles
// of 4 x 4 pixels (csrc/cpu/winograd_conv2d/conv_kernel.h has the method).
//
// A filter that is pruned is 0 in all 36 elements of the transformed domain, so the matrices of the elements are sparse
// in the same places. Vectors hold tiles, so that neither side of the matrices has to come in blocks. Images are NCHW.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/epilogue.h"
#include "cpu/masked_winograd_conv2d/live_filters.h"

namespace sparse_adv {

constexpr int kWindow = 6;      // rows and columns of input pixels that a tile reads
constexpr int kTileGroup = 16;  // tiles are rounded up to a multiple of this; the lanes of all vectors divide it

// Neighbouring tiles of a row of tiles, what they read and where they write.
struct TileRun {
  int64_t input = 0;             // of the first pixel of the first window, in the first channel; may be in the padding
  uint16_t first[kWindow] = {};  // bit 4 i + s of a row: pixel s of the window of tile i is inside the image
  uint16_t last[kWindow] = {};   // the same for pixel s + 4
  int64_t image = 0, row = 0, col = 0;  // the first pixel in the output
  int rows = 0, cols = 0;               // of the output that the tiles have; none if they only fill a vector
  int64_t plane = 0;                    // not joined: the first pixel in the plane of a channel that an item writes
};

// Pixels of a channel that follow each other in the output and in the plane.
struct PixelRun {
  int64_t plane;         // the first one in the plane
  int64_t image, pixel;  // the first one in the output
  int64_t size;
};

// An item of the work: neighbouring rows of tiles. If they are `joined`, a run has kLanes / 4 tiles, whose pixels are
// read and written as vectors. Else it has one, and the pixels of a channel are collected in a plane, since its rows do
// not fill vectors. A vector of tiles has in its lanes 4 i, 4 i + 1, ... the tiles i, i + kLanes / 4, ...: four vectors
// of pixels, transposed in fours, are four vectors of tiles.
struct TileItem {
  bool joined;
  int64_t tiles;  // a multiple of kTileGroup
  const TileRun* runs;
  int64_t plane_pitch, plane_size;
  const PixelRun* writes;
  int64_t write_count;
};

struct ConvSizes {
  int64_t C, K;                            // input and output channels
  int64_t input_pixels, input_row_size;    // of a channel, of a row
  int64_t output_pixels, output_row_size;  // the same of the output
  int64_t slice;                           // output channels whose sums are in the scratch memory, whole oc_blocks

  // V[element][channel][tile] and M[channel][element][tile]. The additions keep rows from the same sets of the L1.
  [[gnu::always_inline]] int64_t v_pitch(int64_t tiles) const { return C * tiles + kTileGroup; }
  [[gnu::always_inline]] int64_t m_pitch(int64_t tiles) const { return kElements * tiles + kTileGroup; }
  int64_t scratch(const TileItem& item) const {
    return kElements * v_pitch(item.tiles) + slice * m_pitch(item.tiles) + item.plane_size;
  }
};

// The tiles of a joined run.
SPARSE_ADV_FOR_EACH_ISA(int masked_winograd_joined_tiles())

// Computes an item with an epilogue without a scale; `scratch` has room for sizes.scratch(item) floats.
SPARSE_ADV_FOR_EACH_ISA(void masked_winograd_item(const ConvSizes& sizes, const LiveFilters& filters,
                                                  const float* values, const TileItem& item, const float* input,
                                                  float* out, const Epilogue<float>& epilogue, float* scratch))

}  // namespace sparse_adv
