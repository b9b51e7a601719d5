#include "cpu/masked_conv2d/conv_kernel.h"

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Ends the sums of one output channel, ROWS x COLS vectors from the tile's row and column on, and writes them.
template <int ROWS, int COLS>
static inline __attribute__((always_inline)) void finish(const TileOutput& output, int32_t channel, int first_row,
                                                         int first_col, const Vec* sum) {
  if (channel < 0) return;
  const Epilogue& epilogue = output.epilogue;
  const Vec scale = broadcast(epilogue.scale ? epilogue.scale[channel] : 1.0f);
  const Vec bias = broadcast(epilogue.bias ? epilogue.bias[channel] : 0.0f);
  const bool affine = epilogue.scale || epilogue.bias;
  int64_t at = channel * output.plane + first_row * output.row_pitch + first_col * kLanes;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r, at += output.row_pitch) {
    if (first_row + r >= output.rows) return;
#pragma GCC unroll 16
    for (int c = 0; c < COLS; ++c) {
      const int64_t left = output.cols - (first_col + c) * kLanes;
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      if (count <= 0) break;
      Vec v = sum[r * COLS + c];
      if (affine) v = fma(v, scale, bias);
      if (epilogue.residual) v = add(v, load_first(epilogue.residual + at + c * kLanes, count));
      if (epilogue.relu) v = relu(v);
      if (count == kLanes)
        store(output.data + at + c * kLanes, v);
      else
        store_first(output.data + at + c * kLanes, v, count);
    }
  }
}

// How a list is walked: entry by entry, each with the values of VECTOR output channels. One broadcast per value, one
// load per vector, VECTOR multiply-adds per loaded vector, no store.
template <int VECTOR>
struct Entries {
  static constexpr int kVector = VECTOR;

  template <int ROWS, int COLS>
  static inline __attribute__((always_inline)) void walk(Vec* sum, const float* window, int64_t row_pitch,
                                                         const int32_t* offsets, const float* values, int count,
                                                         const int32_t*) {
    for (int i = 0; i < count; ++i) {
      const float* at = in_register(window + offsets[i]);
      Vec value[VECTOR];
#pragma GCC unroll 4
      for (int j = 0; j < VECTOR; ++j) value[j] = broadcast(values[i * VECTOR + j]);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < COLS; ++c) {
          Vec x = load(at + c * kLanes);
          if constexpr (VECTOR > 1) x = in_register(x);
#pragma GCC unroll 4
          for (int j = 0; j < VECTOR; ++j) {
            Vec& to = sum[(j * ROWS + r) * COLS + c];
            to = fma(x, value[j], to);
          }
        }
        if (r + 1 < ROWS) at = in_register(at + row_pitch);
      }
    }
  }
};

// Three entries at a time that are neighbouring columns, in either direction: a loaded vector serves all three. Where
// lane = pixel the middle one is aligned, and its neighbours follow from it.
template <bool PIXELS>
struct Threes {
  static constexpr int kVector = 1;

  template <int ROWS, int COLS>
  static inline __attribute__((always_inline)) void walk(Vec* sum, const float* window, int64_t row_pitch,
                                                         const int32_t* offsets, const float* values, int count,
                                                         const int32_t*) {
    if (count == 0) return;
    const int left = offsets[0] < offsets[2] ? 0 : 2;
    window += PIXELS ? 1 - kLanes : 0;
    for (int i = 0; i < count; i += 3) {
      const float* at = in_register(window + offsets[i + left]);
      const Vec value[3] = {broadcast(values[i + left]), broadcast(values[i + 1]), broadcast(values[i + 2 - left])};
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        Vec before = in_register(load(at)), middle = in_register(load(at + kLanes));
#pragma GCC unroll 16
        for (int c = 0; c < COLS; ++c) {
          const float* p = at + (c + 1) * kLanes;
          const Vec after = in_register(load(p + kLanes));
          Vec& to = sum[r * COLS + c];
          to = fma(PIXELS ? one_before(p, before, middle) : before, value[0], to);
          to = fma(middle, value[1], to);
          to = fma(PIXELS ? one_after(p, middle, after) : after, value[2], to);
          before = middle;
          middle = after;
        }
        if (r + 1 < ROWS) at = in_register(at + row_pitch);
      }
    }
  }
};

// Entries sorted by column: in place of loads that cross cache lines, aligned ones whose vectors are shifted. What
// comes in at the ends of a row is 0.
struct SortedByColumn {
  static constexpr int kVector = 1;

  template <int ROWS, int COLS>
  static inline __attribute__((always_inline)) void walk(Vec* sum, const float* window, int64_t row_pitch,
                                                         const int32_t* offsets, const float* values, int count,
                                                         const int32_t* turns) {
    int i = 0;
    for (; i < turns[0]; ++i) {
      const float* p = in_register(window + offsets[i] + 1);
      const Vec value = broadcast(values[i]);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        Vec before = broadcast(0.0f);
#pragma GCC unroll 16
        for (int c = 0; c < COLS; ++c) {
          const Vec v = in_register(load(p + c * kLanes));
          sum[r * COLS + c] = fma(one_before(p + c * kLanes, before, v), value, sum[r * COLS + c]);
          before = v;
        }
        if (r + 1 < ROWS) p = in_register(p + row_pitch);
      }
    }
    Entries<1>::walk<ROWS, COLS>(sum, window, row_pitch, offsets + i, values + i, turns[1] - i, nullptr);
    for (i = turns[1]; i < count; ++i) {
      const float* p = in_register(window + offsets[i] - 1);
      const Vec value = broadcast(values[i]);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        Vec after = broadcast(0.0f);
#pragma GCC unroll 16
        for (int c = COLS - 1; c >= 0; --c) {
          const Vec v = in_register(load(p + c * kLanes));
          sum[r * COLS + c] = fma(one_after(p + c * kLanes, v, after), value, sum[r * COLS + c]);
          after = v;
        }
        if (r + 1 < ROWS) p = in_register(p + row_pitch);
      }
    }
  }
};

// ROWS x COLS vectors of Walk::kVector output channels stay in registers while the list is walked.
template <class Walk, int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(const Tile& tile, int row, int col, int64_t list,
                                                             const int32_t* offsets, const float* values, int count,
                                                             const int32_t* turns, bool first, bool last) {
  constexpr int kVectors = ROWS * COLS, kVector = Walk::kVector;
  float* const sums =
      tile.sums + list * kVector * tile.sums_plane + row * tile.sums_row_pitch + static_cast<int64_t>(col) * kLanes;
  Vec sum[kVector * kVectors];
  if (first) {
#pragma GCC unroll 16
    for (int i = 0; i < kVector * kVectors; ++i) sum[i] = broadcast(0.0f);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kVector; ++j)
#pragma GCC unroll 16
      for (int q = 0; q < kVectors; ++q)
        sum[j * kVectors + q] = load(sums + j * tile.sums_plane + q / COLS * tile.sums_row_pitch + q % COLS * kLanes);
  }
  Walk::template walk<ROWS, COLS>(sum, tile.window + row * tile.window_row_pitch + col * kLanes, tile.window_row_pitch,
                                  offsets, values, count, turns);
  if (last && tile.output) {
#pragma GCC unroll 4
    for (int j = 0; j < kVector; ++j)
      finish<ROWS, COLS>(*tile.output, tile.output->channel_of[list * kVector + j], row, col, sum + j * kVectors);
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVector; ++j)
#pragma GCC unroll 16
    for (int q = 0; q < kVectors; ++q)
      store(sums + j * tile.sums_plane + q / COLS * tile.sums_row_pitch + q % COLS * kLanes, sum[j * kVectors + q]);
}

template <class Walk, int TILE_COLS>
static void tile_of(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const Tile& tile) {
  constexpr int kVectors = kAccumulators / Walk::kVector;
  constexpr int kCols = kVectors < TILE_COLS ? kVectors : TILE_COLS;
  constexpr int kRows = kVectors / kCols;
  for (int64_t segment = first_segment; segment < last_segment; ++segment) {
    const int32_t* rows = lists.rows + segment * lists.vectors;
    const bool last = segment + 1 == lists.segments;
    for (int64_t i = 0; i < lists.vectors; ++i) {
      const int count = rows[i + 1] - rows[i];
      if (count == 0 && segment > 0 && !(last && tile.output)) continue;
      const int32_t* offsets = lists.offsets + rows[i];
      const float* values = lists.values + static_cast<int64_t>(rows[i]) * Walk::kVector;
      const int32_t* turns = lists.turns ? lists.turns + 2 * (segment * lists.vectors + i) : nullptr;
      // Part by part within the list and not the other way round: the list stays in the L1.
      for (int part = 0; part < kTileVectors; part += kVectors)
        accumulate<Walk, kRows, kCols>(tile, part / TILE_COLS, part % TILE_COLS, i, offsets, values, count, turns,
                                       segment == 0, last);
    }
  }
}

template <class Walk>
static void tile_of(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const Tile& tile) {
  if (tile.cols == 16) return tile_of<Walk, 16>(lists, first_segment, last_segment, tile);
  if (tile.cols == 8) return tile_of<Walk, 8>(lists, first_segment, last_segment, tile);
  if (tile.cols == 4) return tile_of<Walk, 4>(lists, first_segment, last_segment, tile);
  if (tile.cols == 2) return tile_of<Walk, 2>(lists, first_segment, last_segment, tile);
  return tile_of<Walk, 1>(lists, first_segment, last_segment, tile);
}

void masked_conv2d_tile(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const Tile& tile) {
  switch (lists.columns) {
    case Columns::threes_of_vectors:
      return tile_of<Threes<false>>(lists, first_segment, last_segment, tile);
    case Columns::threes_of_pixels:
      return tile_of<Threes<true>>(lists, first_segment, last_segment, tile);
    case Columns::by_column:
      return tile_of<SortedByColumn>(lists, first_segment, last_segment, tile);
    default:
      break;
  }
  if (lists.vector == 4) return tile_of<Entries<4>>(lists, first_segment, last_segment, tile);
  if (lists.vector == 2) return tile_of<Entries<2>>(lists, first_segment, last_segment, tile);
  return tile_of<Entries<1>>(lists, first_segment, last_segment, tile);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
