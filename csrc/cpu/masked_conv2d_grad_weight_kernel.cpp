#include "cpu/masked_conv2d_grad_weight_kernel.h"

#include "cpu/lanes.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Collects one vector per entry and, each time kLanes are there, adds their sums over the lanes to the totals: about
// three instructions per entry, where keeping a vector of lanes per entry and tile would load and store 128 bytes.
class LaneSums {
 public:
  explicit LaneSums(float* totals) : totals_(totals) {}
  int room() const { return kLanes - filled_; }
  void push(Vec v) { store(vectors_ + filled_++ * kLanes, v); }
  void flush() {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(vectors_ + i * kLanes);
    const Vec sums = sum_of_each(v);
    if (filled_ == kLanes) {
      store(totals_, add(load(totals_), sums));
    } else {
      store_first(totals_, add(load_first(totals_, filled_), sums), filled_);
    }
    totals_ += filled_;
    filled_ = 0;
  }

 private:
  float* totals_;
  int filled_ = 0;
  alignas(64) float vectors_[kLanes * kLanes] = {};
};

// The gradient's ROWS x COLS pixels stay in registers while the list is walked: one multiply-add per pixel and entry,
// in four partial sums that hide its latency.
template <int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(const float* window, int64_t row_pitch, const float* grad,
                                                             int64_t grad_row_pitch, const int32_t* offsets, int count,
                                                             LaneSums& sums) {
  constexpr int kPartial = 4;
  Vec g[ROWS * COLS];
#pragma GCC unroll 16
  for (int q = 0; q < ROWS * COLS; ++q) g[q] = load(grad + q / COLS * grad_row_pitch + q % COLS * kLanes);
  for (int i = 0; i < count;) {
    const int end = count - i < sums.room() ? count : i + sums.room();
    for (; i < end; ++i) {
      const float* row[ROWS];
      row[0] = in_register(window + offsets[i]);
#pragma GCC unroll 4
      for (int r = 1; r < ROWS; ++r) row[r] = in_register(row[r - 1] + row_pitch);
      Vec partial[kPartial] = {};
#pragma GCC unroll 16
      for (int q = 0; q < ROWS * COLS; ++q)
        partial[q % kPartial] = fma(load(row[q / COLS] + q % COLS * kLanes), g[q], partial[q % kPartial]);
      sums.push(add(add(partial[0], partial[1]), add(partial[2], partial[3])));
    }
    if (sums.room() == 0) sums.flush();
  }
}

template <int TILE_COLS>
static void tile_of(const OffsetLists& lists, const GradWeightTile& tile, float* totals) {
  constexpr int kCols = kAccumulators < TILE_COLS ? kAccumulators : TILE_COLS;
  constexpr int kRows = kAccumulators / kCols;
  const int64_t entries = lists.rows[lists.segments * lists.vectors];
  for (int part = 0; part < kTilePixels; part += kAccumulators) {
    const int row = part / TILE_COLS, col = part % TILE_COLS * kLanes;
    const float* window = tile.window + row * tile.window_row_pitch + col;
    const float* grad = tile.grad + row * tile.grad_row_pitch + col;
    for (int64_t segment = 0; segment < lists.segments; ++segment) {
      const int32_t* rows = lists.rows + segment * lists.vectors;
      for (int64_t j = 0; j < lists.vector; ++j) {
        LaneSums sums(totals + j * entries + rows[0]);
        for (int64_t i = 0; i < lists.vectors; ++i) {
          // A row beyond the last channel: its totals are never read, so any plane will do.
          const int32_t channel = tile.channel_of[i * lists.vector + j];
          accumulate<kRows, kCols>(window, tile.window_row_pitch, grad + (channel < 0 ? 0 : channel) * tile.grad_plane,
                                   tile.grad_row_pitch, lists.offsets + rows[i], rows[i + 1] - rows[i], sums);
        }
        sums.flush();
      }
    }
  }
}

void masked_conv2d_grad_weight_tile(const OffsetLists& lists, const GradWeightTile& tile, float* totals) {
  if (tile.tile_cols == 16) return tile_of<16>(lists, tile, totals);
  if (tile.tile_cols == 8) return tile_of<8>(lists, tile, totals);
  return tile_of<4>(lists, tile, totals);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
