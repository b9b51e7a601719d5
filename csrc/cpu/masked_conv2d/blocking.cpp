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

Blocking::Blocking(ConvAxis rows_, ConvAxis cols_, const PassSizes& sizes)
    : rows(std::move(rows_)),
      cols(std::move(cols_)),
      source_channels(sizes.source_channels),
      lanes(SPARSE_ADV_CHOOSE(lane_count)()),
      batch_(sizes.batch) {
  choose_tile(!sizes.channels_last && rows.is_unit_stride() && cols.is_unit_stride(), sizes);
  if (joins_rows())
    lay_out_joined_rows(sizes);
  else if (width_vectorised())
    lay_out_width(sizes);
  if (width_vectorised() && fits_int32()) return;
  choose_tile(false, sizes);
  lay_out_batch(sizes);
}

// Chooses the layout and the tile shape of the least cost, in multiply-adds of an oc_block of 4: one for each computed
// vector and kept weight, and the cost of each vector that is moved from the images to the input tile or from the
// accumulators to the output. The batch-vectorised layout transposes it: 1.4 of the 6.0 ms of 64 channels at 32x32 and
// density 0.02. Of 40 layers of random shapes, a cost of 14 was as good as 10 in the mean and better where they differ
// (160 and 28 channels at 22x22: 2.4 -> 1.9 ms). With an oc_block of 1 each multiply-add waits for a load, which is
// slower where it crosses a cache line: width-vectorised, 64 channels at 56x56 took 10.0 ms, batch-vectorised 8.3.
//
// The order in which the shapes are tried decides between equal ones: of the width-vectorised tiles the nearly square
// ones come first, because they read the smallest halo (a tile of 2 x 8 or 4 x 4 vectors reads 4 x 10 or 6 x 6 of them
// for 3x3 taps, one of 1 x 16 reads 3 x 18); of the batch-vectorised tiles those with the longest rows, which are
// contiguous.
//
// 1x1 filters: with rows that end within a vector, 15 layers of random shapes took 1.5 times as long as without (AVX2,
// density 0.1), since they take more vectors, and their lanes are counted when the last one is stored.
void Blocking::choose_tile(bool width_vectors_allowed, const PassSizes& sizes) {
  constexpr double kMovedByWidth = 3, kMovedByBatch = 14, kLoad = 1.6, kCrossingLoad = 2.1;
  const int64_t piece = width_vectors_allowed ? piece_size(sizes.gated) : 0, pixels = rows.positions * cols.positions;
  const int64_t pitch = width_vectors_allowed && !sizes.whole_tiles ? pitch_of_joined_rows() : 0;
  double least = -1;
  const auto offer = [&](Layout offered, int cols_of_tile) {
    const bool by_batch = offered == Layout::batch, in_rows = offered == Layout::rows;
    struct {
      int64_t count, size, last;  // rows of this size, and one of the pixels that are left over
    } row{.count = rows.positions, .size = cols.positions, .last = 0};
    if (offered == Layout::pieces) row = {.count = pixels / piece, .size = piece, .last = pixels % piece};
    if (offered == Layout::joined_rows) row = {.count = 1, .size = rows.positions * pitch, .last = 0};
    const TilePart whole{.rows = kTileVectors / cols_of_tile, .cols = cols_of_tile};
    const TilePart part = sizes.whole_tiles ? whole : SPARSE_ADV_CHOOSE(part_of_tile)(cols_of_tile, sizes.oc_block);
    const auto vectors_of = [&](int64_t size) { return by_batch ? size : this->vectors_of(size); };
    // Those of all rows in multiples of `by`.
    const auto vectors_by = [&](TilePart by) {
      return round_up(vectors_of(row.size), by.cols) * round_up(row.count, by.rows) +
             round_up(vectors_of(row.last), by.cols);
    };
    const int64_t vectors = vectors_by(part), images = by_batch ? lanes : 1;
    // Whole rows are shifted in registers; single pixels, and those of pieces, are read at aligned addresses.
    const bool crossing = offered == Layout::joined_rows || (in_rows && cols_of_tile < vectors_of(row.size));
    const double multiply_add = sizes.oc_block > 1 ? 1 : crossing ? kCrossingLoad : kLoad;
    const double moved = by_batch ? kMovedByBatch : kMovedByWidth;
    const double stored = offered == Layout::joined_rows ? 2 * moved : moved;  // in a pass of its own
    const double cost = static_cast<double>((batch_ + images - 1) / images) *
                        (multiply_add * static_cast<double>(vectors * sizes.kept_weights) +
                         moved * static_cast<double>(source_channels * vectors_by(whole)) +
                         stored * static_cast<double>(sizes.output_channels * vectors_by({.rows = 1, .cols = 1})));
    if (least >= 0 && cost >= least) return;
    least = cost;
    layout = offered;
    tile_cols = cols_of_tile;
    tile_rows = kTileVectors / cols_of_tile;
    row_vectors_inside = vectors_of(row.size);
    plane_vectors = vectors;
  };
  if (piece > 0) {
    offer(Layout::pieces, kTileVectors);
  } else if (width_vectors_allowed) {
    for (int tile : {2, 4, 1, 8, 16}) offer(Layout::rows, tile);
    if (pitch > 0) offer(Layout::joined_rows, kTileVectors);
  }
  for (int tile : {16, 8, 4, 2}) offer(Layout::batch, tile);
  if (in_pieces()) cut_into_pieces(piece);
  if (joins_rows()) joined_pitch = pitch;
}

// The pixels of a piece: as many as a tile has lanes; 0 if images cannot be cut into pieces. The rows of a gate are
// padded to bytes. Where they are, pieces are whole rows, so that no two of them write bits of one byte.
int64_t Blocking::piece_size(bool gated) const {
  const auto reads_its_own_pixel = [](const ConvAxis& axis) {
    return axis.is_unit_stride() && axis.taps.size() == 1 && axis.pad == 0 && axis.source_size == axis.output_size;
  };
  if (!reads_its_own_pixel(rows) || !reads_its_own_pixel(cols)) return 0;
  const int64_t size = std::min<int64_t>(rows.positions * cols.positions, kTileVectors * lanes);
  return gated && cols.positions % 8 != 0 ? size / cols.positions * cols.positions : size;
}

// The pitch at which a tap that reaches beyond either end of a row reads zeros; 0 if rows cannot be joined.
int64_t Blocking::pitch_of_joined_rows() const {
  if (cols.pad < 0) return 0;
  return std::max(cols.source_size + cols.pad, cols.positions + cols.max_shift - cols.pad);
}

void Blocking::cut_into_pieces(int64_t piece) {
  const int64_t pixels = rows.positions * cols.positions, pieces = (pixels + piece - 1) / piece;
  last_piece = pixels - (pieces - 1) * piece;
  rows.source_size = rows.output_size = rows.positions = pieces;
  cols.source_size = cols.output_size = cols.positions = piece;
}

// Cuts the rows into bands whose accumulators fill at most half of the L2 cache, and the channels into panels whose
// input tile fills at most a third of it; the rest is for the weights and the images that stream through. Measured with
// an L2 of 2 MB (docs/design/masked_conv2d.md): 64 channels at 32x32 took 14.6, 10.9, 9.9, 9.8 and 11.2 ms with 0.5,
// 1, 1.5, 2 and 8 MB of scratch memory. Bands have equal heights: a last band of few rows would convert as many halo
// rows as the others. A pass with several output phases (grad_input with a stride) has one panel, since its weights are
// sorted by phase and not by panel.
void Blocking::cut_bands_and_panels(const PassSizes& sizes, int64_t acc_vectors_per_row) {
  const int64_t vector_bytes = lanes * kFloat;
  const int64_t row_bytes = sizes.output_channels * acc_vectors_per_row * vector_bytes;
  const int64_t rows_that_fit = std::max<int64_t>(l2_bytes() / 2 / row_bytes, tile_rows) / tile_rows * tile_rows;
  bands = (rows.positions + rows_that_fit - 1) / rows_that_fit;
  band_rows = round_up((rows.positions + bands - 1) / bands, tile_rows);
  bands = (rows.positions + band_rows - 1) / band_rows;
  channel_pitch = rows.source_phases * (band_rows + rows.max_shift) * row_pitch;
  ic_panel = source_channels;
  if (sizes.ic_block > 0 && output_phases() == 1) {
    ic_panel = sizes.ic_block;
    while (ic_panel < source_channels && 2 * ic_panel * channel_pitch * vector_bytes <= l2_bytes() / 3) ic_panel *= 2;
  }
  // Tile after tile, each with all channels of the panel. With all pixels of a channel together, the channels of a tile
  // can lie 4 KB apart, in a few sets of the L1 cache: 64 channels at 32x32 took 1.1 times as long.
  if (in_pieces()) {
    channel_pitch = row_pitch;
    row_pitch *= ic_panel;
  }
}

void Blocking::lay_out_batch(const PassSizes& sizes) {
  batch_block = lanes;
  row_lead = 0;
  row_vectors = round_up(row_vectors_inside, tile_cols);
  phase_cols = row_vectors + cols.max_shift;
  row_pitch = cols.source_phases * phase_cols;
  acc_row_pitch = row_vectors;
  cut_bands_and_panels(sizes, output_phases() * row_vectors);
  // The L1 cache has 64 sets. With a pitch of a multiple of 32 lines, the accumulators of all channels of a tile fall
  // into the same few sets and evict the input tile from them, which cost 4 % of the time.
  acc_channel_pitch = output_phases() * band_rows * acc_row_pitch;
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
  cut_bands_and_panels(sizes, row_vectors);
}

// A vector of room behind the tile and behind each plane of accumulators: the kernels read whole vectors.
void Blocking::lay_out_joined_rows(const PassSizes& sizes) {
  batch_block = 1;
  row_lead = round_up(std::max(cols.pad, cols.max_shift - cols.pad), lanes);
  row_pitch = vectors_of(joined_pitch);
  cut_bands_and_panels(sizes, row_pitch);
  row_vectors = round_up(vectors_of(band_rows * joined_pitch), tile_cols);
  row_vectors_inside = row_vectors;
  channel_pitch = vectors_of(row_lead + rows.max_shift * joined_pitch + cols.max_shift) + row_vectors + 1;
  acc_row_pitch = row_vectors;
  acc_channel_pitch = row_vectors + 1;
}

int64_t Blocking::vectors_in_row(int64_t band, int64_t row) const {
  if (joins_rows()) return vectors_of((rows_in_band(band) - 1) * joined_pitch + cols.positions);
  return is_last_piece(band * band_rows + row) ? vectors_of(last_piece) : row_vectors_inside;
}

int64_t Blocking::acc_offset(int64_t row, int64_t col, int64_t channels) const {
  if (!width_vectorised() || joins_rows()) return row * acc_row_pitch + col;
  return (row / tile_rows * (row_vectors / tile_cols) + col / tile_cols) * channels * kTileVectors;
}

int64_t Blocking::acc_size(int64_t channels) const {
  return channels * (width_vectorised() && !joins_rows() ? band_rows * row_vectors : acc_channel_pitch);
}

int64_t Blocking::tap_offset(int64_t tap, int64_t output_phase) const {
  const auto filter_cols = static_cast<int64_t>(cols.taps.size());
  const ConvAxis::Tap& row = rows.taps[tap / filter_cols];
  const ConvAxis::Tap& col = cols.taps[tap % filter_cols];
  if (row.output_phase != output_phase / cols.output_phases || col.output_phase != output_phase % cols.output_phases)
    return -1;
  if (width_vectorised()) return row.shift * row_stride() + row_lead - cols.pad + col.shift;
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
