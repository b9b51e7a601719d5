// How a pass of the sparse kernel divides its work, so that data that is read repeatedly stays in the caches.
//
// - Batch: one work item has `batch_block` images.
// - Rows: output rows are cut into bands. A work item computes one band of its images.
// - Channels that the pass reads: cut into slices. For one slice after the other, the input tile is filled and its
//   products are added to the accumulators. The input tile has the rows and columns of the images that a band reads,
//   its padding and halo included, for the channels of a slice.
// - Positions of a band: computed in tiles of kTileVectors vectors, tile_rows x tile_cols, without those register
//   blocks that lie beyond the end of the images.
// - Joined rows and segments: several rows count as one, which fills more lanes (Layout, in layout_choice.h).
// - Channels that the pass writes: threads share a work item by them where the work items do not divide evenly.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/rounding.h"
#include "cpu/masked_conv2d/conv_axis.h"
#include "cpu/masked_conv2d/conv_kernel.h"
#include "cpu/masked_conv2d/conv_params.h"
#include "cpu/masked_conv2d/layout_choice.h"

namespace sparse_adv {

struct Blocking {
  ConvAxis rows, cols;
  Layout layout = Layout::batch;
  int64_t last_segment = 0;
  int64_t source_channels = 0;
  int64_t ic_slice = 0;  // channels of a slice: a power of 2, unless one slice has all
  int lanes = 0;
  int64_t batch_block = 0;
  int tile_rows = 0, tile_cols = 0;
  int64_t band_rows = 0;  // positions (of rows) per band: a multiple of tile_rows
  int64_t bands = 0;
  int64_t row_vectors_inside = 0;            // vectors of a row that have positions of the images
  int64_t row_vectors = 0;                   // the same, rounded up to whole tiles
  int64_t plane_vectors = 0;                 // vectors that are computed of a channel, of one batch block
  int64_t row_lead = 0;                      // width-vectorised: zeros in front of a row's first pixel, in floats
  int64_t joined_pitch = 0;                  // joined_rows: from one row of a phase to the next, in floats
  int64_t phase_cols = 0;                    // batch-vectorised: vectors per source phase of a row
  int64_t phase_pitch = 0;                   // joined_rows: vectors from one source phase of a channel to the next
  int64_t row_pitch = 0, channel_pitch = 0;  // input tile: vectors from one row, one channel to the next
  // Accumulators: vectors from one row, one channel to the next; in the layouts rows and segments within one tile,
  // which are stored one after the other.
  int64_t acc_row_pitch = 0, acc_channel_pitch = 0;
  int64_t acc_phase_pitch = 0;  // vectors from one output phase of a channel to the next

  Blocking(ConvAxis rows, ConvAxis cols, const PassSizes& sizes);

  bool width_vectorised() const { return layout != Layout::batch; }
  bool in_segments() const { return layout == Layout::segments; }
  bool joins_rows() const { return layout == Layout::joined_rows; }
  // Whether the input tile must be 0 at first, because what lies between its rows is read and never written.
  bool has_gaps() const { return width_vectorised() && !in_segments(); }
  int64_t source_phases() const { return rows.source_phases * cols.source_phases; }
  int64_t output_phases() const { return rows.output_phases * cols.output_phases; }
  int64_t work_items() const { return batch_blocks() * bands; }
  // The batch, rounded up to whole batch blocks.
  int64_t padded_batch() const { return batch_blocks() * batch_block; }
  // The number of positions that are computed, including those outside of the images.
  int64_t computed_positions() const { return batch_blocks() * lanes * plane_vectors; }
  int64_t rows_in_band(int64_t band) const { return std::min(band_rows, rows.positions - band * band_rows); }
  // Floats of the input tile that all work items fill, halo and padding included.
  double filled_floats() const {
    return static_cast<double>(work_items()) * static_cast<double>(source_channels * channel_pitch * lanes);
  }
  // Rows that the kernel computes for a band and each output phase, and vectors of one that have positions of the
  // images.
  int64_t computed_rows(int64_t band) const { return joins_rows() ? 1 : rows_in_band(band); }
  int64_t vectors_in_row(int64_t band, int64_t row) const;
  bool is_last_segment(int64_t row) const { return in_segments() && row + 1 == rows.positions; }
  // Of `size` pixels of a row, those that this one has.
  int64_t cols_in_row(int64_t row, int64_t size) const { return is_last_segment(row) ? last_segment : size; }
  // Width-vectorised: from one row of a source phase to the next in the input tile, in floats.
  int64_t row_stride() const { return joins_rows() ? joined_pitch : row_pitch * lanes; }
  // The same of joined rows, rounded up to whole vectors.
  int64_t padded_joined_pitch() const { return vectors_of(joined_pitch) * lanes; }
  // Where the accumulators of the tile at (row, col) start, in vectors.
  int64_t acc_offset(int64_t row, int64_t col, int64_t channels) const;
  // Vectors that the accumulators of a band take.
  int64_t acc_size(int64_t channels) const;
  // Floats that the input tile takes, where fits_int32().
  int64_t input_tile_size() const { return tile_floats<int64_t>(); }
  int64_t slice_channels(int64_t first_channel) const { return std::min(ic_slice, source_channels - first_channel); }
  // The offset, in floats, from a position to what a tap reads.
  int64_t tap_offset(int64_t tap) const;
  // The output phase whose positions read by this tap.
  int64_t output_phase(int64_t tap) const;
  // At unit stride, width-vectorised: the column that a tap reads, relative to the position.
  int64_t column_offset(int64_t tap) const { return col_tap(tap).shift - cols.pad; }
  // The order in which the kernel may take the three taps of a filter row together; `any` if it may not.
  IndexOrder triple_order() const;
  // Whether the kernel may take column indices sorted by their column offset.
  bool can_sort_by_column(int64_t oc_block) const;
  // The filter rows that read pixels, not padding, at a row of positions; for passes with one output phase.
  FilterRows filter_rows_inside(int64_t position) const;
  // Whether to leave out filter rows that read padding: where the kernel can, and gains by it.
  bool should_skip_padding(int64_t oc_block, int64_t indices_per_row) const;
  // Whether offsets into the input tile fit. In double: with large padding and dilation the size overflows int64.
  bool fits_int32() const { return tile_floats<double>() < static_cast<double>(int64_t{1} << 31); }

 private:
  template <class Number>
  Number tile_floats() const {
    const int64_t pitch = in_segments() ? row_pitch : channel_pitch, count = in_segments() ? band_rows : ic_slice;
    return static_cast<Number>(pitch) * static_cast<Number>(count * lanes) + static_cast<Number>(row_lead);
  }
  const ConvAxis::Tap& row_tap(int64_t tap) const { return rows.taps[tap / std::ssize(cols.taps)]; }
  const ConvAxis::Tap& col_tap(int64_t tap) const { return cols.taps[tap % std::ssize(cols.taps)]; }
  // Vectors that so many neighbouring floats take.
  int64_t vectors_of(int64_t floats) const { return divide_up(floats, lanes); }

  int64_t batch_;
  int64_t batch_blocks() const { return divide_up(batch_, batch_block); }
  void take(const LayoutChoice& choice);
  void cut_into_segments(int64_t segment);
  void cut_bands_and_slices(const PassSizes& sizes, int64_t acc_vectors_per_row);
  void lay_out_batch(const PassSizes& sizes);
  void lay_out_width(const PassSizes& sizes);
  void lay_out_joined_rows(const PassSizes& sizes);
};

// The blocking of the passes, for the instruction set in use.
Blocking forward_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last, bool gated);
Blocking grad_weight_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last);
Blocking grad_input_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last, bool gated);

}  // namespace sparse_adv
