#include "cpu/masked_conv2d/layout_choice.h"

#include <algorithm>
#include <optional>

#include "common/rounding.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

namespace {

// The pixels of a segment: as many as a tile has lanes; 0 if images cannot be cut into segments. The rows of a gate are
// padded to bytes. Where they are, segments are whole rows, so that no two of them write bits of one byte.
int64_t segment_size(const ConvAxis& rows, const ConvAxis& cols, int lanes, bool gated) {
  const auto reads_its_own_pixel = [](const ConvAxis& axis) {
    return axis.is_unit_stride() && axis.taps.size() == 1 && axis.pad == 0 && axis.source_size == axis.output_size;
  };
  if (!reads_its_own_pixel(rows) || !reads_its_own_pixel(cols)) return 0;
  const int64_t size = std::min<int64_t>(rows.positions * cols.positions, kTileVectors * lanes);
  return gated && cols.positions % 8 != 0 ? size / cols.positions * cols.positions : size;
}

// The pitch at which a tap that reaches beyond either end of a row reads zeros, and which has room for all positions of
// a row; 0 if rows cannot be joined. The pixels of a row have the positions from pad / source_phases to
// (source_size - 1 + pad) / source_phases, and taps read those from 0 to positions - 1 + max_shift.
int64_t pitch_of_joined_rows(const ConvAxis& cols) {
  const int64_t phases = cols.source_phases;
  if (phases > 2 || cols.output_phases > 2) return 0;
  return std::max({(cols.source_size - 1 + cols.pad) / phases + 1, cols.positions + cols.max_shift - cols.pad / phases,
                   cols.positions});
}

// What a layout computes of a channel and moves of one, in vectors and in rows.
struct Work {
  int64_t images;                         // of a vector
  int64_t row_vectors;                    // with positions of a row
  int64_t vectors;                        // computed
  int64_t read_vectors, read_rows;        // of a channel that is read
  int64_t written_vectors, written_rows;  // of a channel that is written
  bool crossing;                          // loads may cross cache lines
};

// The work of each layout with a tile of so many columns.
struct Layouts {
  const ConvAxis& rows;
  const ConvAxis& cols;
  const PassSizes& sizes;
  const int lanes;

  int64_t vectors_of(int64_t floats) const { return divide_up(floats, lanes); }

  RegisterBlock register_block_of(int tile_cols) const {
    if (sizes.whole_tiles) return {.rows = kTileVectors / tile_cols, .cols = tile_cols};
    return SPARSE_ADV_CHOOSE(register_block_of_tile)(tile_cols, sizes.oc_block);
  }

  // A plane of vectors in whole register blocks, and in whole tiles.
  int64_t in_register_blocks(int64_t plane_rows, int64_t plane_cols, int tile_cols) const {
    const RegisterBlock block = register_block_of(tile_cols);
    return round_up(plane_rows, block.rows) * round_up(plane_cols, block.cols);
  }
  static int64_t in_tiles(int64_t plane_rows, int64_t plane_cols, int tile_cols) {
    return round_up(plane_rows, kTileVectors / tile_cols) * round_up(plane_cols, tile_cols);
  }

  Work batch(int tile_cols) const {
    const int64_t positions = rows.positions * cols.positions;
    return {.images = lanes,
            .row_vectors = cols.positions,
            .vectors = in_register_blocks(rows.positions, cols.positions, tile_cols),
            .read_vectors = rows.phases_read_count() * cols.phases_read_count() *
                            in_tiles(rows.positions, cols.positions, tile_cols),
            .read_rows = 0,
            .written_vectors = rows.output_phases * cols.output_phases * positions,
            .written_rows = 0,
            .crossing = false};
  }

  Work own_rows(int tile_cols) const {
    const int64_t row_vectors = vectors_of(cols.positions);
    return {.images = 1,
            .row_vectors = row_vectors,
            .vectors = in_register_blocks(rows.positions, row_vectors, tile_cols),
            .read_vectors = in_tiles(rows.positions, row_vectors, tile_cols),
            .read_rows = rows.positions,
            .written_vectors = rows.positions * row_vectors,
            .written_rows = rows.positions,
            .crossing = tile_cols < row_vectors};  // whole rows are shifted in registers
  }

  Work joined_rows(int64_t pitch) const {
    const int64_t row_vectors = vectors_of(rows.positions * pitch);
    const int64_t read_rows = rows.phases_read_count() * rows.positions;
    return {.images = 1,
            .row_vectors = row_vectors,
            .vectors = in_register_blocks(1, row_vectors, kTileVectors),
            .read_vectors = read_rows * cols.source_phases * vectors_of(pitch),
            .read_rows = read_rows,
            .written_vectors = rows.output_size * vectors_of(cols.output_size),
            .written_rows = rows.output_size,
            .crossing = true};
  }

  Work segments(int64_t segment) const {
    const int64_t pixels = rows.positions * cols.positions, count = pixels / segment,
                  last = vectors_of(pixels % segment);
    return {.images = 1,
            .row_vectors = vectors_of(segment),
            .vectors = count * in_register_blocks(1, vectors_of(segment), kTileVectors) +
                       in_register_blocks(1, last, kTileVectors),
            .read_vectors = (count + (last > 0)) * kTileVectors,  // whole tiles are written
            .read_rows = count,
            .written_vectors = count * vectors_of(segment) + last,
            .written_rows = count,
            .crossing = false};
  }
};

// Costs of moving, in multiply-adds of an oc_block of 4: of a vector, and in addition of each row.
struct MoveCost {
  double vector, row;
};

// The cost of a pass, in multiply-adds of an oc_block of 4: one for each computed vector and kept weight, and the cost
// of what is moved from the images to the input tile and from the accumulators to the output. The batch-vectorised
// layout transposes it: 1.4 of the 6.0 ms of 64 channels at 32x32 and density 0.02. With an oc_block of 1 each
// multiply-add waits for a load, which is slower where it crosses a cache line: width-vectorised, 64 channels at 56x56
// took 10.0 ms, batch-vectorised 8.3.
//
// The costs of moving were fitted by non-negative least squares to timings of 50 layers in each layout (AVX2,
// docs/design/masked_conv2d.md): 13 to 28 for a vector, as much again for a row, 70 to 90 for a batch vector whose gate
// is read or written. Other programs ran on the machine meanwhile, which slows moves more than arithmetic. So the
// constants are about 0.6 of the fitted ones.
//
// A vector of 16 lanes is as long as a cache line. So transposing one takes twice as long, and two of three taps in a
// row of pixels read two lines, which makes a multiply-add 1.2 times as slow on average (AVX-512, 504 passes in each
// layout).
double cost_of(Layout layout, const Work& work, const PassSizes& sizes, int lanes) {
  constexpr double kLoad = 1.6, kCrossingLoad = 2.1, kTwoLines = 1.2, kBatchGate = 34;
  const bool by_batch = layout == Layout::batch, joined = layout == Layout::joined_rows, is_line = lanes == 16;
  const double transposed = is_line ? 28 : 14;
  const MoveCost read = by_batch ? MoveCost{transposed, 0} : MoveCost{7, 6};
  const MoveCost written = by_batch      ? MoveCost{transposed + (sizes.gated ? kBatchGate : 0), 0}
                           : sizes.gated ? MoveCost{20, 18}
                           : joined      ? MoveCost{17, 20}
                                         : MoveCost{13, 12};
  const auto moved = [](const MoveCost& cost, int64_t channels, int64_t vectors, int64_t rows) {
    return static_cast<double>(channels) *
           (cost.vector * static_cast<double>(vectors) + cost.row * static_cast<double>(rows));
  };
  const double load = sizes.oc_block > 1 ? 1 : work.crossing ? kCrossingLoad : kLoad;
  const double multiply_add = is_line && (joined || layout == Layout::rows) ? kTwoLines * load : load;
  return static_cast<double>(divide_up(sizes.batch, work.images)) *
         (multiply_add * static_cast<double>(work.vectors) * static_cast<double>(sizes.kept_weights) +
          moved(read, sizes.source_channels, work.read_vectors, work.read_rows) +
          moved(written, sizes.output_channels, work.written_vectors, work.written_rows));
}

}  // namespace

// The order in which the tiles are tried decides between equal ones: of the width-vectorised tiles the nearly square
// ones come first, because they read the smallest halo (a tile of 2 x 8 or 4 x 4 vectors reads 4 x 10 or 6 x 6 of them
// for 3x3 taps, one of 1 x 16 reads 3 x 18); of the batch-vectorised tiles those with the longest rows, which are
// contiguous.
//
// 1x1 filters: with rows that end within a vector, 15 layers of random shapes took 1.5 times as long as without (AVX2,
// density 0.1), since they take more vectors, and their lanes are counted when the last one is stored.
LayoutChoice choose_layout(const ConvAxis& rows, const ConvAxis& cols, const PassSizes& sizes, int lanes,
                           bool width_vectors_allowed) {
  const Layouts layouts{.rows = rows, .cols = cols, .sizes = sizes, .lanes = lanes};
  std::optional<LayoutChoice> best;
  double least = 0;
  const auto offer = [&](LayoutChoice choice, const Work& work) {
    const double cost = cost_of(choice.layout, work, sizes, lanes);
    if (best && cost >= least) return;
    least = cost;
    choice.row_vectors_inside = work.row_vectors;
    choice.plane_vectors = work.vectors;
    best = choice;
  };
  const int64_t segment = width_vectors_allowed ? segment_size(rows, cols, lanes, sizes.gated) : 0;
  if (segment > 0) {
    offer({.layout = Layout::segments, .tile_cols = kTileVectors, .segment = segment}, layouts.segments(segment));
  } else if (width_vectors_allowed) {
    if (rows.is_unit_stride() && cols.is_unit_stride())
      for (int tile_cols : {2, 4, 1, 8, 16})
        offer({.layout = Layout::rows, .tile_cols = tile_cols}, layouts.own_rows(tile_cols));
    if (const int64_t pitch = pitch_of_joined_rows(cols))
      offer({.layout = Layout::joined_rows, .tile_cols = kTileVectors, .joined_pitch = pitch},
            layouts.joined_rows(pitch));
  }
  for (int tile_cols : {16, 8, 4, 2})
    offer({.layout = Layout::batch, .tile_cols = tile_cols}, layouts.batch(tile_cols));
  return *best;
}

}  // namespace sparse_adv
