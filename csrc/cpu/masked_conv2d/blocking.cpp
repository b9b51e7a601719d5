#include "cpu/masked_conv2d/blocking.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/masked_conv2d/batch_layout_kernel.h"

namespace sparse_adv {

namespace {

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

int64_t l2_bytes() {
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 19, 2 << 20);
  return bytes;
}

constexpr int64_t kFloat = sizeof(float);

}  // namespace

Window::Window(Axis rows_, Axis cols_, const PassShape& shape)
    : rows(std::move(rows_)),
      cols(std::move(cols_)),
      channels(shape.channels),
      lanes(SPARSE_ADV_CHOOSE(lane_count)()),
      batch_(shape.batch) {
  const bool rows_can_be_vectors = !shape.channels_last && rows.is_unit() && cols.is_unit();
  choose_layout(rows_can_be_vectors);
  if (lane_is_pixel) lay_out_pixels(shape);
  if (lane_is_pixel && fits_int32()) return;
  choose_layout(false);
  lay_out_samples(shape);
}

// The layout and tile that compute the fewest vectors. Lane = sample must save a tenth, since it transposes images.
void Window::choose_layout(bool pixels_allowed) {
  double least = -1;
  const auto offer = [&](bool pixel, int width, int64_t samples, int64_t row_vectors, double factor) {
    const int64_t vectors = round_up(row_vectors, width) * round_up(rows.extent, kTileVectors / width);
    const double cost = factor * static_cast<double>((batch_ + samples - 1) / samples * vectors);
    if (least >= 0 && cost >= least) return;
    least = cost;
    lane_is_pixel = pixel;
    tile_cols = width;
    tile_rows = kTileVectors / width;
  };
  if (pixels_allowed)
    for (int width : {2, 4, 1, 8, 16}) offer(true, width, 1, (cols.extent + lanes - 1) / lanes, 1);
  for (int width : {16, 8, 4}) offer(false, width, lanes, cols.extent, 1.1);
}

// Cuts the rows into strips whose sums fill half of the L2, and the channels into blocks whose window fills a third of
// it: the rest is for the lists and for what streams by. Strips are equal, since the last one must not be a sliver that
// converts as many halo rows as the others.
void Window::cut(const PassShape& shape, int64_t sums_per_row, int64_t pitch) {
  const int64_t vector_bytes = lanes * kFloat;
  const int64_t row_bytes = shape.output_channels * sums_per_row * vector_bytes;
  const int64_t fitting = std::max<int64_t>(l2_bytes() / 2 / row_bytes, tile_rows) / tile_rows * tile_rows;
  strips = (rows.extent + fitting - 1) / fitting;
  strip = round_up((rows.extent + strips - 1) / strips, tile_rows);
  strips = (rows.extent + strip - 1) / strip;
  row_pitch = pitch;
  plane = rows.source_phases * (strip + rows.max_shift) * row_pitch;
  block = channels;
  if (shape.segment_channels > 0 && phases() == 1) {
    block = shape.segment_channels;
    while (block < channels && 2 * block * plane * vector_bytes <= l2_bytes() / 3) block *= 2;
  }
}

void Window::lay_out_samples(const PassShape& shape) {
  images = lanes;
  lead = 0;
  across = round_up(cols.extent, tile_cols);
  window_cols = across + cols.max_shift;
  sums_row_pitch = across;
  cut(shape, phases() * across, cols.source_phases * window_cols);
  // Not a multiple of half the L1's period of 64 lines: otherwise the tiles of all channels fall into the same cache
  // sets and push the window out of them.
  sums_plane = phases() * strip * sums_row_pitch;
  if (sums_plane % 32 == 0) sums_plane += 16;
}

void Window::lay_out_pixels(const PassShape& shape) {
  images = 1;
  across = round_up((cols.extent + lanes - 1) / lanes, tile_cols);
  // A vector that starts in the last columns of a row ends in the zeros before the next row, never in its pixels.
  lead = round_up(std::max(cols.pad, cols.max_shift - cols.pad), lanes);
  // Tile after tile and not plane after plane: the kernel then walks the sums in memory order.
  sums_row_pitch = tile_cols;
  sums_plane = kTileVectors;
  cut(shape, across, lead / lanes + std::max(across, (cols.source_size + lanes - 1) / lanes));
}

int64_t Window::sums_at(int64_t row, int64_t col, int64_t planes) const {
  if (!lane_is_pixel) return row * sums_row_pitch + col;
  return (row / tile_rows * (across / tile_cols) + col / tile_cols) * planes * kTileVectors;
}

int64_t Window::sums_size(int64_t planes) const { return planes * (lane_is_pixel ? strip * across : sums_plane); }

int64_t Window::tap_offset(int64_t tap, int64_t phase) const {
  const auto filter_cols = static_cast<int64_t>(cols.taps.size());
  const Axis::Tap& row = rows.taps[tap / filter_cols];
  const Axis::Tap& col = cols.taps[tap % filter_cols];
  if (row.output_phase != phase / cols.output_phases || col.output_phase != phase % cols.output_phases) return -1;
  if (lane_is_pixel) return row.shift * row_pitch * lanes + lead - cols.pad + col.shift;
  return ((row.source_phase * (strip + rows.max_shift) + row.shift) * row_pitch + col.source_phase * window_cols +
          col.shift) *
         lanes;
}

Columns Window::columns_of_threes() const {
  const bool neighbours = cols.is_unit() && rows.is_unit() && cols.taps.size() == 3 && cols.max_shift == 2;
  if (!neighbours || (lane_is_pixel && cols.pad != 1)) return Columns::any;
  return lane_is_pixel ? Columns::threes_of_pixels : Columns::threes_of_vectors;
}

// Vectors of a whole cache line only: of shorter ones not every load beside the position crosses one. And where no
// output channels share a load, which then counts less.
bool Window::sorts_by_column(int64_t vector) const {
  return vector == 1 && lanes == 16 && across == tile_cols && columns_of_threes() == Columns::threes_of_pixels;
}

Window forward_window(const Convolution& conv, const Pattern& pattern, bool channels_last) {
  return {Axis::forward(conv.H, conv.P, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          Axis::forward(conv.W, conv.Q, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          {conv.N, conv.C, conv.K, conv.groups == 1 ? pattern.forward_segment : 0, channels_last}};
}

Window grad_input_window(const Convolution& conv, const Pattern& pattern, bool channels_last) {
  return {Axis::grad_input(conv.P, conv.H, conv.R, conv.stride[0], conv.padding[0], conv.dilation[0]),
          Axis::grad_input(conv.Q, conv.W, conv.S, conv.stride[1], conv.padding[1], conv.dilation[1]),
          {conv.N, conv.K, conv.C, conv.groups == 1 ? pattern.grad_input_segment : 0, channels_last}};
}

}  // namespace sparse_adv
