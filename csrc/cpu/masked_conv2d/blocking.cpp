#include "cpu/masked_conv2d/blocking.h"

#include <algorithm>

#include "common/rounding.h"
#include "cpu/l2_cache.h"
#include "cpu/masked_conv2d/batch_layout_kernel.h"

namespace sparse_adv {

namespace {

constexpr int64_t kFloat = sizeof(float);

}  // namespace

Blocking::Blocking(ConvAxis rows_, ConvAxis cols_, const PassSizes& sizes)
    : rows(rows_),
      cols(cols_),
      source_channels(sizes.source_channels),
      lanes(SPARSE_ADV_CHOOSE(lane_count)()),
      batch_(sizes.batch) {
  take(choose_layout(rows, cols, sizes, lanes, !sizes.channels_last));
  if (joins_rows())
    lay_out_joined_rows(sizes);
  else if (width_vectorised())
    lay_out_width(sizes);
  if (width_vectorised() && fits_int32()) return;
  rows = std::move(rows_);  // they may have been cut into segments
  cols = std::move(cols_);
  take(choose_layout(rows, cols, sizes, lanes, false));
  lay_out_batch(sizes);
}

void Blocking::take(const LayoutChoice& choice) {
  layout = choice.layout;
  tile_cols = choice.tile_cols;
  tile_rows = kTileVectors / tile_cols;
  row_vectors_inside = choice.row_vectors_inside;
  plane_vectors = choice.plane_vectors;
  joined_pitch = choice.joined_pitch;
  if (in_segments()) cut_into_segments(choice.segment);
}

void Blocking::cut_into_segments(int64_t segment) {
  const int64_t pixels = rows.positions * cols.positions, segments = divide_up(pixels, segment);
  last_segment = pixels - (segments - 1) * segment;
  rows.source_size = rows.output_size = rows.positions = segments;
  cols.source_size = cols.output_size = cols.positions = segment;
}

// Cuts the rows into bands whose accumulators fill at most half of the L2 cache, and the channels into slices whose
// input tile fills at most a third of it; the rest is for the weights and the images that stream through. Measured with
// an L2 of 2 MB (docs/design/masked_conv2d_history.md): 64 channels at 32x32 took 14.6, 10.9, 9.9, 9.8 and 11.2 ms with
// 0.5, 1, 1.5, 2 and 8 MB of scratch memory. Bands have equal heights: a last band of few rows would convert as many
// halo rows as the others. A pass with several output phases (grad_input with a stride) has one slice, since its
// weights are sorted by phase and not by slice.
void Blocking::cut_bands_and_slices(const PassSizes& sizes, int64_t acc_vectors_per_row) {
  const int64_t vector_bytes = lanes * kFloat;
  const int64_t row_bytes = sizes.output_channels * acc_vectors_per_row * vector_bytes;
  const int64_t rows_that_fit = std::max<int64_t>(l2_bytes() / 2 / row_bytes, tile_rows) / tile_rows * tile_rows;
  bands = divide_up(rows.positions, rows_that_fit);
  band_rows = round_up(divide_up(rows.positions, bands), tile_rows);
  bands = divide_up(rows.positions, band_rows);
  channel_pitch = rows.source_phases * (band_rows + rows.max_shift) * row_pitch;
  ic_slice = source_channels;
  if (sizes.ic_block > 0 && output_phases() == 1) {
    ic_slice = sizes.ic_block;
    while (ic_slice < source_channels && 2 * ic_slice * channel_pitch * vector_bytes <= l2_bytes() / 3) ic_slice *= 2;
  }
  // Tile after tile, each with all channels of the slice. With all pixels of a channel together, the channels of a tile
  // can lie 4 KB apart, in a few sets of the L1 cache: 64 channels at 32x32 took 1.1 times as long.
  if (in_segments()) {
    channel_pitch = row_pitch;
    row_pitch *= ic_slice;
  }
}

void Blocking::lay_out_batch(const PassSizes& sizes) {
  batch_block = lanes;
  row_lead = 0;
  row_vectors = round_up(row_vectors_inside, tile_cols);
  phase_cols = row_vectors + cols.max_shift;
  row_pitch = cols.source_phases * phase_cols;
  acc_row_pitch = row_vectors;
  cut_bands_and_slices(sizes, output_phases() * row_vectors);
  // The L1 cache has 64 sets. With a pitch of a multiple of 32 lines, the accumulators of all channels of a tile fall
  // into the same few sets and evict the input tile from them, which cost 4 % of the time.
  acc_phase_pitch = band_rows * acc_row_pitch;
  acc_channel_pitch = output_phases() * acc_phase_pitch;
  if (acc_channel_pitch % 32 == 0) acc_channel_pitch += 16;
}

void Blocking::lay_out_width(const PassSizes& sizes) {
  batch_block = 1;
  row_vectors = round_up(row_vectors_inside, tile_cols);
  // A vector that starts in the last columns of a row ends in the zeros in front of the next row, never in its pixels.
  row_lead = round_up(std::max(cols.pad, cols.max_shift - cols.pad), lanes);
  row_pitch = row_lead / lanes + std::max(row_vectors, vectors_of(cols.source_size));
  // The accumulators are stored tile after tile, so that the kernel reads them in memory order.
  acc_row_pitch = tile_cols;
  acc_channel_pitch = kTileVectors;
  cut_bands_and_slices(sizes, row_vectors);
}

// A vector of room behind each source phase of a channel and behind each of accumulators: whole vectors are read, and
// written behind the end of a row.
void Blocking::lay_out_joined_rows(const PassSizes& sizes) {
  batch_block = 1;
  row_lead = round_up(cols.pad / cols.source_phases, lanes);
  row_pitch = cols.source_phases * vectors_of(joined_pitch);
  cut_bands_and_slices(sizes, output_phases() * vectors_of(joined_pitch));
  row_vectors = round_up(vectors_of(band_rows * joined_pitch), tile_cols);
  row_vectors_inside = row_vectors;
  phase_pitch = vectors_of(row_lead + rows.max_shift * joined_pitch + cols.max_shift) + row_vectors + 1;
  channel_pitch = source_phases() * phase_pitch;
  acc_row_pitch = row_vectors;
  acc_phase_pitch = row_vectors + 1;
  acc_channel_pitch = output_phases() * acc_phase_pitch;
}

int64_t Blocking::vectors_in_row(int64_t band, int64_t row) const {
  if (joins_rows()) return vectors_of((rows_in_band(band) - 1) * joined_pitch + cols.positions);
  return is_last_segment(band * band_rows + row) ? vectors_of(last_segment) : row_vectors_inside;
}

int64_t Blocking::acc_offset(int64_t row, int64_t col, int64_t channels) const {
  if (!width_vectorised() || joins_rows()) return row * acc_row_pitch + col;
  return (row / tile_rows * (row_vectors / tile_cols) + col / tile_cols) * channels * kTileVectors;
}

int64_t Blocking::acc_size(int64_t channels) const {
  return channels * (width_vectorised() && !joins_rows() ? band_rows * row_vectors : acc_channel_pitch);
}

int64_t Blocking::output_phase(int64_t tap) const {
  return row_tap(tap).output_phase * cols.output_phases + col_tap(tap).output_phase;
}

int64_t Blocking::tap_offset(int64_t tap) const {
  const ConvAxis::Tap& row = row_tap(tap);
  const ConvAxis::Tap& col = col_tap(tap);
  if (width_vectorised()) {
    const int64_t phase = row.source_phase * cols.source_phases + col.source_phase;
    return phase * phase_pitch * lanes + row.shift * row_stride() + row_lead - cols.pad / cols.source_phases +
           col.shift;
  }
  return ((row.source_phase * (band_rows + rows.max_shift) + row.shift) * row_pitch + col.source_phase * phase_cols +
          col.shift) *
         lanes;
}

IndexOrder Blocking::triple_order() const {
  const bool are_neighbours =
      cols.is_unit_stride() && rows.is_unit_stride() && cols.taps.size() == 3 && cols.max_shift == 2;
  if (!are_neighbours || (width_vectorised() && cols.pad != 1)) return IndexOrder::any;
  return width_vectorised() ? IndexOrder::width_triples : IndexOrder::batch_triples;
}

// Sorting replaces loads that cross a cache line by shifts in registers. It is faster where every load of a column
// before or after a position crosses a line, which is so if a vector is as long as a line (16 lanes), and where each
// load serves one output channel only: 17.5 -> 14.5 ms for 64 channels at 32x32 and density 0.2. Tiles must have whole
// rows, because 0 is shifted in at both ends of a row.
bool Blocking::can_sort_by_column(int64_t oc_block) const {
  return layout == Layout::rows && oc_block == 1 && lanes == 16 && row_vectors == tile_cols &&
         triple_order() == IndexOrder::width_triples;
}

FilterRows Blocking::filter_rows_inside(int64_t position) const {
  FilterRows inside{.begin = 0, .end = 0};
  for (int32_t r = 0; r < std::ssize(rows.taps); ++r) {
    const int64_t source = (position + rows.taps[r].shift) * rows.source_phases + rows.taps[r].source_phase - rows.pad;
    if (source < 0 || source >= rows.source_size) continue;
    if (inside.end == 0) inside.begin = r;
    inside.end = r + 1;
  }
  return inside;
}

// Each filter row reads pixels in some row of a register block that has several, nearly always. So it does with an
// oc_block of 1, whose blocks are large. Blocks with column indices of their own end their loops at numbers that the
// processor does not foresee: with 14 column indices in a row, (2, 2) at 0.1 and 512@4 took 1.12 times as long on AVX2,
// with 43 0.94. Width-vectorised images have many rows: nothing gained.
bool Blocking::should_skip_padding(int64_t oc_block, int64_t indices_per_row) const {
  constexpr int64_t kMinIndices = 24;
  if (oc_block == 1 || width_vectorised() || output_phases() > 1 || indices_per_row < kMinIndices) return false;
  if (SPARSE_ADV_CHOOSE(register_block_of_tile)(tile_cols, oc_block).rows > 1) return false;
  const FilterRows top = filter_rows_inside(0), bottom = filter_rows_inside(rows.positions - 1);
  const auto all = static_cast<int32_t>(rows.taps.size());
  return top.end - top.begin < all || bottom.end - bottom.begin < all;
}

namespace {

// The order of the forward pass and of grad_weight, which reads the same input tile.
Blocking blocking_of_input(const ConvParams& conv, const Pattern& pattern, bool channels_last, bool whole_tiles,
                           bool gated) {
  return {ConvAxis::forward(conv.H, conv.P, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          ConvAxis::forward(conv.W, conv.Q, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          {.batch = conv.N,
           .source_channels = conv.C,
           .output_channels = conv.K,
           .kept_weights = pattern.kept_weights,
           .oc_block = pattern.forward_oc_block,
           .ic_block = conv.groups == 1 ? pattern.forward_ic_block : 0,
           .channels_last = channels_last,
           .whole_tiles = whole_tiles,
           .gated = gated}};
}

}  // namespace

Blocking forward_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last, bool gated) {
  return blocking_of_input(conv, pattern, channels_last, false, gated);
}

Blocking grad_weight_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last) {
  return blocking_of_input(conv, pattern, channels_last, true, false);
}

Blocking grad_input_blocking(const ConvParams& conv, const Pattern& pattern, bool channels_last, bool gated) {
  return {ConvAxis::grad_input(conv.P, conv.H, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          ConvAxis::grad_input(conv.Q, conv.W, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          {.batch = conv.N,
           .source_channels = conv.K,
           .output_channels = conv.C,
           .kept_weights = pattern.kept_weights,
           .oc_block = pattern.grad_input_oc_block,
           .ic_block = conv.groups == 1 ? pattern.grad_input_ic_block : 0,
           .channels_last = channels_last,
           .whole_tiles = false,
           .gated = gated}};
}

}  // namespace sparse_adv
