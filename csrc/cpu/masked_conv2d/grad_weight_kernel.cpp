#include "cpu/masked_conv2d/grad_weight_kernel.h"

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Collects a vector of lanes per kept value and, each time kLanes are there, adds their sums over the lanes to the
// totals: about three instructions a value, where keeping a vector of lanes per value and tile would load and store 128
// bytes.
template <int VECTOR>
class LaneSums {
 public:
  static constexpr int kRoom = kLanes / VECTOR;  // entries
  explicit LaneSums(float* totals) : totals_(totals) {}
  int room() const { return kRoom - filled_; }
  void push(const Vec v[VECTOR]) {
    Vec folded = v[0];
    if constexpr (VECTOR == 2) folded = add_pair(v[0], v[1]);
    if constexpr (VECTOR == 4) folded = add_pairs(add_pair(v[0], v[1]), add_pair(v[2], v[3]));
    store(vectors_ + filled_++ * kLanes, folded);
  }
  void flush() {
    Vec v[kRoom], quads[kLanes / 4];
#pragma GCC unroll 16
    for (int i = 0; i < kRoom; ++i) v[i] = load(vectors_ + i * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i) {
      if constexpr (VECTOR == 1)
        quads[i] = add_pairs(add_pair(v[4 * i], v[4 * i + 1]), add_pair(v[4 * i + 2], v[4 * i + 3]));
      else if constexpr (VECTOR == 2)
        quads[i] = add_pairs(v[2 * i], v[2 * i + 1]);
      else
        quads[i] = v[i];
    }
    const Vec sums = add_quads(quads);
    const int count = filled_ * VECTOR;
    if (count == kLanes) {
      store(totals_, add(load(totals_), sums));
    } else {
      store_first(totals_, add(load_first(totals_, count), sums), count);
    }
    totals_ += count;
    filled_ = 0;
  }

 private:
  float* totals_;
  int filled_ = 0;
  alignas(64) float vectors_[kRoom * kLanes] = {};
};

// One entry: sum[j] = its products with the gradient g of VECTOR channels, added over ROWS x COLS vectors. An entry of
// COLUMN -1 or 1 reads the column before or after its position, from aligned vectors that are shifted; what comes in at
// the ends of a row is 0.
template <int VECTOR, int ROWS, int COLS, int COLUMN>
static inline __attribute__((always_inline)) void multiply(const float* at, int64_t row_pitch, const Vec* g, Vec* sum) {
  constexpr int kVectors = ROWS * COLS, kPartial = 4 / VECTOR;  // enough sums to hide the latency of a multiply-add
  Vec partial[VECTOR * kPartial] = {};
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    Vec beside = broadcast(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < COLS; ++i) {
      const int c = COLUMN > 0 ? COLS - 1 - i : i, q = r * COLS + c;
      const float* p = at + c * kLanes;
      Vec x = load(p);
      if constexpr (VECTOR > 1 || COLUMN != 0) x = in_register(x);
      const Vec shifted = COLUMN < 0 ? one_before(p, beside, x) : COLUMN > 0 ? one_after(p, x, beside) : x;
      beside = x;
#pragma GCC unroll 4
      for (int j = 0; j < VECTOR; ++j) {
        Vec& to = partial[q % kPartial * VECTOR + j];
        to = fma(shifted, g[j * kVectors + q], to);
      }
    }
    if (r + 1 < ROWS) at = in_register(at + row_pitch);
  }
#pragma GCC unroll 4
  for (int j = 0; j < VECTOR; ++j) {
    if constexpr (kPartial == 4)
      sum[j] = add(add(partial[j], partial[VECTOR + j]), add(partial[2 * VECTOR + j], partial[3 * VECTOR + j]));
    else if constexpr (kPartial == 2)
      sum[j] = add(partial[j], partial[VECTOR + j]);
    else
      sum[j] = partial[j];
  }
}

template <int VECTOR, int ROWS, int COLS, int COLUMN>
static inline __attribute__((always_inline)) void walk(const float* window, int64_t row_pitch, const Vec* g,
                                                       const int32_t* offsets, int count, LaneSums<VECTOR>& sums) {
  window -= COLUMN;
  for (int i = 0; i < count;) {
    const int end = count - i < sums.room() ? count : i + sums.room();
    for (; i < end; ++i) {
      Vec sum[VECTOR];
      multiply<VECTOR, ROWS, COLS, COLUMN>(in_register(window + offsets[i]), row_pitch, g, sum);
      sums.push(sum);
    }
    if (sums.room() == 0) sums.flush();
  }
}

// ROWS x COLS vectors of the gradient of VECTOR channels stay in registers while the list is walked: one load per
// vector of the window and entry, VECTOR multiply-adds each.
template <int VECTOR, int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(const float* window, int64_t row_pitch,
                                                             const float* const grad[VECTOR], int64_t grad_row_pitch,
                                                             const int32_t* offsets, int count, const int32_t* turns,
                                                             LaneSums<VECTOR>& sums) {
  constexpr int kVectors = ROWS * COLS;
  Vec g[VECTOR * kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < VECTOR; ++j)
#pragma GCC unroll 16
    for (int q = 0; q < kVectors; ++q)
      g[j * kVectors + q] = load(grad[j] + q / COLS * grad_row_pitch + q % COLS * kLanes);
  if constexpr (VECTOR == 1) {
    if (turns) {
      walk<1, ROWS, COLS, -1>(window, row_pitch, g, offsets, turns[0], sums);
      walk<1, ROWS, COLS, 0>(window, row_pitch, g, offsets + turns[0], turns[1] - turns[0], sums);
      walk<1, ROWS, COLS, 1>(window, row_pitch, g, offsets + turns[1], count - turns[1], sums);
      return;
    }
  }
  walk<VECTOR, ROWS, COLS, 0>(window, row_pitch, g, offsets, count, sums);
}

template <int VECTOR, int TILE_COLS>
static void tile_of(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const GradWeightTile& tile,
                    float* totals) {
  constexpr int kVectors = kAccumulators / VECTOR;
  constexpr int kCols = kVectors < TILE_COLS ? kVectors : TILE_COLS;
  constexpr int kRows = kVectors / kCols;
  for (int part = 0; part < kTileVectors; part += kVectors) {
    const int row = part / TILE_COLS, col = part % TILE_COLS * kLanes;
    const float* window = tile.window + row * tile.window_row_pitch + col;
    const float* first = tile.grad + row * tile.grad_row_pitch + col;
    for (int64_t segment = first_segment; segment < last_segment; ++segment) {
      const int32_t* rows = lists.rows + segment * lists.vectors;
      LaneSums<VECTOR> sums(totals + static_cast<int64_t>(rows[0]) * VECTOR);
      for (int64_t i = 0; i < lists.vectors; ++i) {
        const float* grad[VECTOR];
        for (int j = 0; j < VECTOR; ++j) {
          // A row beyond the last channel: its totals are never read, so any plane will do.
          const int32_t channel = tile.channel_of[i * VECTOR + j];
          grad[j] = first + (channel < 0 ? 0 : channel) * tile.grad_plane;
        }
        accumulate<VECTOR, kRows, kCols>(window, tile.window_row_pitch, grad, tile.grad_row_pitch,
                                         lists.offsets + rows[i], rows[i + 1] - rows[i],
                                         lists.turns ? lists.turns + 2 * (segment * lists.vectors + i) : nullptr, sums);
      }
      sums.flush();
    }
  }
}

template <int VECTOR>
static void tile_of(const OffsetLists& lists, int64_t first_segment, int64_t last_segment, const GradWeightTile& tile,
                    float* totals) {
  if (tile.tile_cols == 16) return tile_of<VECTOR, 16>(lists, first_segment, last_segment, tile, totals);
  if (tile.tile_cols == 8) return tile_of<VECTOR, 8>(lists, first_segment, last_segment, tile, totals);
  if (tile.tile_cols == 4) return tile_of<VECTOR, 4>(lists, first_segment, last_segment, tile, totals);
  if (tile.tile_cols == 2) return tile_of<VECTOR, 2>(lists, first_segment, last_segment, tile, totals);
  return tile_of<VECTOR, 1>(lists, first_segment, last_segment, tile, totals);
}

void masked_conv2d_grad_weight_tile(const OffsetLists& lists, int64_t first_segment, int64_t last_segment,
                                    const GradWeightTile& tile, float* totals) {
  if (lists.vector == 4) return tile_of<4>(lists, first_segment, last_segment, tile, totals);
  if (lists.vector == 2) return tile_of<2>(lists, first_segment, last_segment, tile, totals);
  return tile_of<1>(lists, first_segment, last_segment, tile, totals);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
