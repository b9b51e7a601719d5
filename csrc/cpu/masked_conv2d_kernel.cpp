#include "cpu/masked_conv2d_kernel.h"

#include "cpu/lane_layout_kernel.h"
#include "cpu/lanes.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// ROWS x COLS pixels of `VECTOR` output channels stay in registers while the list is walked: one broadcast per value,
// one load per pixel, VECTOR multiply-adds per loaded pixel, no store. `first`: the tile holds nothing yet.
template <int VECTOR, int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(const float* window, int64_t row_pitch,
                                                             const int32_t* offsets, const float* values, int count,
                                                             bool first, float* tile) {
  constexpr int kPixels = ROWS * COLS;
  Vec sum[VECTOR * kPixels];
  if (first) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR * kPixels; ++i) sum[i] = broadcast(0.0f);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < VECTOR; ++j)
#pragma GCC unroll 16
      for (int q = 0; q < kPixels; ++q) sum[j * kPixels + q] = load(tile + (j * kTilePixels + q) * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    const float* pixel = window + offsets[i];
    Vec value[VECTOR];
#pragma GCC unroll 4
    for (int j = 0; j < VECTOR; ++j) value[j] = broadcast(values[i * VECTOR + j]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < COLS; ++c) {
        const Vec x = load(pixel + r * row_pitch + c * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < VECTOR; ++j) {
          Vec& to = sum[j * kPixels + r * COLS + c];
          to = fma(x, value[j], to);
        }
      }
  }
#pragma GCC unroll 4
  for (int j = 0; j < VECTOR; ++j)
#pragma GCC unroll 16
    for (int q = 0; q < kPixels; ++q) store(tile + (j * kTilePixels + q) * kLanes, sum[j * kPixels + q]);
}

template <int VECTOR, int TILE_COLS>
static void tile_of(const OffsetLists& lists, const float* window, int64_t row_pitch, float* tile) {
  constexpr int kPixels = kAccumulators / VECTOR;
  constexpr int kCols = kPixels < TILE_COLS ? kPixels : TILE_COLS;
  constexpr int kRows = kPixels / kCols;
  for (int part = 0; part < kTilePixels; part += kPixels) {
    const float* at = window + part / TILE_COLS * row_pitch + part % TILE_COLS * kLanes;
    for (int64_t segment = 0; segment < lists.segments; ++segment) {
      const int32_t* rows = lists.rows + segment * lists.vectors;
      for (int64_t i = 0; i < lists.vectors; ++i) {
        const int count = rows[i + 1] - rows[i];
        if (count == 0 && segment > 0) continue;
        accumulate<VECTOR, kRows, kCols>(at, row_pitch, lists.offsets + rows[i],
                                         lists.values + static_cast<int64_t>(rows[i]) * VECTOR, count, segment == 0,
                                         tile + (i * VECTOR * kTilePixels + part) * kLanes);
      }
    }
  }
}

template <int VECTOR>
static void tile_of(const OffsetLists& lists, const float* window, int64_t row_pitch, int tile_cols, float* tile) {
  if (tile_cols == 16) return tile_of<VECTOR, 16>(lists, window, row_pitch, tile);
  if (tile_cols == 8) return tile_of<VECTOR, 8>(lists, window, row_pitch, tile);
  return tile_of<VECTOR, 4>(lists, window, row_pitch, tile);
}

void masked_conv2d_tile(const OffsetLists& lists, const float* window, int64_t row_pitch, int tile_cols, float* tile) {
  if (lists.vector == 4) return tile_of<4>(lists, window, row_pitch, tile_cols, tile);
  if (lists.vector == 2) return tile_of<2>(lists, window, row_pitch, tile_cols, tile);
  return tile_of<1>(lists, window, row_pitch, tile_cols, tile);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
