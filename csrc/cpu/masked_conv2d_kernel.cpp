#include "cpu/masked_conv2d_kernel.h"

#include "cpu/lanes.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// ROWS x COLS pixels of `VECTOR` output channels stay in registers while the list is walked: one broadcast per value,
// one load per pixel, VECTOR multiply-adds per loaded pixel, no store. `first`: the tile holds nothing yet.
template <int VECTOR, int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(const Tile& tile, const float* window, float* sums,
                                                             const int32_t* offsets, const float* values, int count,
                                                             bool first) {
  constexpr int kPixels = ROWS * COLS;
  Vec sum[VECTOR * kPixels];
  if (first) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR * kPixels; ++i) sum[i] = broadcast(0.0f);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < VECTOR; ++j)
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q)
        sum[j * kPixels + q] = load(sums + j * tile.sums_plane + q / COLS * tile.sums_row_pitch + q % COLS * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    const float* row[ROWS];
    row[0] = in_register(window + offsets[i]);
#pragma GCC unroll 4
    for (int r = 1; r < ROWS; ++r) row[r] = in_register(row[r - 1] + tile.window_row_pitch);
    Vec value[VECTOR];
#pragma GCC unroll 4
    for (int j = 0; j < VECTOR; ++j) value[j] = broadcast(values[i * VECTOR + j]);
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) {
      const Vec x = load(row[q / COLS] + q % COLS * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < VECTOR; ++j) sum[j * kPixels + q] = fma(x, value[j], sum[j * kPixels + q]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < VECTOR; ++j)
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q)
      store(sums + j * tile.sums_plane + q / COLS * tile.sums_row_pitch + q % COLS * kLanes, sum[j * kPixels + q]);
}

template <int VECTOR, int TILE_COLS>
static void tile_of(const OffsetLists& lists, const Tile& tile) {
  constexpr int kPixels = kAccumulators / VECTOR;
  constexpr int kCols = kPixels < TILE_COLS ? kPixels : TILE_COLS;
  constexpr int kRows = kPixels / kCols;
  for (int64_t segment = 0; segment < lists.segments; ++segment) {
    const int32_t* rows = lists.rows + segment * lists.vectors;
    for (int64_t i = 0; i < lists.vectors; ++i) {
      const int count = rows[i + 1] - rows[i];
      if (count == 0 && segment > 0) continue;
      const int32_t* offsets = lists.offsets + rows[i];
      const float* values = lists.values + static_cast<int64_t>(rows[i]) * VECTOR;
      // Part by part within the list and not the other way round: the list stays in the L1.
      for (int part = 0; part < kTilePixels; part += kPixels) {
        const int row = part / TILE_COLS, col = part % TILE_COLS * kLanes;
        accumulate<VECTOR, kRows, kCols>(tile, tile.window + row * tile.window_row_pitch + col,
                                         tile.sums + i * VECTOR * tile.sums_plane + row * tile.sums_row_pitch + col,
                                         offsets, values, count, segment == 0);
      }
    }
  }
}

template <int VECTOR>
static void tile_of(const OffsetLists& lists, const Tile& tile) {
  if (tile.cols == 16) return tile_of<VECTOR, 16>(lists, tile);
  if (tile.cols == 8) return tile_of<VECTOR, 8>(lists, tile);
  return tile_of<VECTOR, 4>(lists, tile);
}

void masked_conv2d_tile(const OffsetLists& lists, const Tile& tile) {
  if (lists.vector == 4) return tile_of<4>(lists, tile);
  if (lists.vector == 2) return tile_of<2>(lists, tile);
  return tile_of<1>(lists, tile);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
