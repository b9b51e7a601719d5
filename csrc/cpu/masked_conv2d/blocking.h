// How one pass divides its work: strips of output rows whose window of the images (padding included) fits the L2 cache,
// blocks of channels, and tiles of vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/masked_conv2d/conv_geometry.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/conv_params.h"

namespace sparse_adv {

// What a pass reads and writes, as far as the window depends on it.
struct PassShape {
  int64_t batch, channels, output_channels;
  int64_t segment_channels;  // the window may hold multiples of so many channels at a time; 0: only all of them
  bool channels_last;
};

// How the images of a strip lie in vectors: a line is a row of the images, padding included. A lane is either
// - a sample: a vector is a pixel of kLanes images (sample_lanes_kernel.h), or
// - a pixel: a vector is kLanes neighbouring pixels of one image (pixel_lanes_kernel.h), for NCHW at unit stride.
// Tiles are tile_rows lines x tile_cols vectors.
struct Window {
  Axis rows, cols;
  int64_t channels;
  int64_t block;  // channels that the window holds at a time: a power of 2, unless it holds all
  int lanes;
  bool lane_is_pixel;
  int64_t images;  // of a strip
  int tile_rows, tile_cols;
  int64_t strip;  // positions (of rows) per strip: a multiple of tile_rows
  int64_t strips;
  int64_t across;                      // vectors that tiles compute of a row
  int64_t lead;                        // lane = pixel: floats before a row's first pixel, always 0
  int64_t window_cols;                 // lane = sample: vectors per source phase and row
  int64_t row_pitch, plane;            // vectors from one row, one channel to the next
  int64_t sums_row_pitch, sums_plane;  // the same of the sums, within a tile; lane = sample: a plane holds all phases

  Window(Axis rows, Axis cols, const PassShape& shape);

  int64_t phases() const { return rows.output_phases * cols.output_phases; }
  int64_t items() const { return (batch_ + images - 1) / images * strips; }
  // The batch, filled up to whole vectors, and all positions that are computed of it, those outside images included.
  int64_t padded_batch() const { return (batch_ + images - 1) / images * images; }
  int64_t computed_positions() const {
    return padded_batch() / images * lanes * across * ((rows.extent + tile_rows - 1) / tile_rows * tile_rows);
  }
  int64_t rows_of(int64_t strip_index) const { return std::min(strip, rows.extent - strip_index * strip); }
  // Where a tile's sums start, in vectors, and how many vectors the sums of all `planes` channels take.
  int64_t sums_at(int64_t row, int64_t col, int64_t planes) const;
  int64_t sums_size(int64_t planes) const;
  // Room for a block of channels, in floats.
  int64_t block_size() const { return block * plane * lanes + lead; }
  int64_t block_channels(int64_t first) const { return std::min(block, channels - first); }
  // Offset of a tap from the position it belongs to, in floats, or -1 if it is of another phase.
  int64_t tap_offset(int64_t tap, int64_t phase) const;
  // How the kernel may take the taps of a row of three together, if it can, and whether it may take sorted ones.
  Columns columns_of_threes() const;
  bool sorts_by_column(int64_t vector) const;
  // By how many columns a tap reads beside its position; lane = pixel.
  int64_t column_of(int64_t tap) const { return cols.taps[tap % std::ssize(cols.taps)].shift - cols.pad; }
  bool fits_int32() const { return block_size() < (int64_t{1} << 31); }

 private:
  int64_t batch_;
  void choose_layout(bool pixels_allowed);
  void cut(const PassShape& shape, int64_t sums_per_row, int64_t pitch);
  void lay_out_samples(const PassShape& shape);
  void lay_out_pixels(const PassShape& shape);
};

// The windows of the two passes, for the instruction set in use.
Window forward_window(const Convolution& conv, const Pattern& pattern, bool channels_last);
Window grad_input_window(const Convolution& conv, const Pattern& pattern, bool channels_last);

}  // namespace sparse_adv
