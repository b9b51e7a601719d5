#include "cpu/masked_conv2d/grad_weight_kernel.h"

#include "cpu/simd.h"

namespace sparse_adv {
namespace SPARSE_ADV_ISA {

// Adds to `partials` the sums over the lanes of the first `count` of kLanes vectors.
static inline void add_lane_sums(const Vec v[kLanes], int count, float* partials) {
  Vec quads[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i)
    quads[i] = add_pairs(add_pair(v[4 * i], v[4 * i + 1]), add_pair(v[4 * i + 2], v[4 * i + 3]));
  const Vec sums = add_quads(quads);
  if (count == kLanes)
    store(partials, add(load(partials), sums));
  else
    store_first(partials, add(load_first(partials, count), sums), count);
}

// COUNT column indices of a row whose weights come in oc_blocks of 2 or 4, and all vectors of the tile: kLanes sums in
// registers at most. A loaded vector of the gradient serves all column indices, one of the input all channels: 8 loads
// for 16 multiply-adds with an oc_block of 4. With the gradient in registers instead and one column index at a time,
// lane sums were needed for every 4 or 8 vectors of a tile and not for all 16, and took as long as the products.
template <int OC_BLOCK, int COUNT, int TILE_COLS>
static inline __attribute__((always_inline)) void add_indices(const float* input, int64_t input_row_pitch,
                                                              const float* const grad[OC_BLOCK], int64_t grad_row_pitch,
                                                              const int32_t* offsets, float* partials) {
  Vec sum[kLanes] = {};
  const float* at[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) at[i] = in_register(input + offsets[i]);
  int64_t input_row = 0, grad_row = 0;
  for (int r = 0; r < kTileVectors / TILE_COLS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLS; ++c) {
      Vec g[OC_BLOCK];
#pragma GCC unroll 4
      for (int j = 0; j < OC_BLOCK; ++j) g[j] = in_register(load(grad[j] + grad_row + c * kLanes));
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        const Vec x = in_register(load(at[i] + input_row + c * kLanes));
#pragma GCC unroll 4
        for (int j = 0; j < OC_BLOCK; ++j) sum[i * OC_BLOCK + j] = fma(x, g[j], sum[i * OC_BLOCK + j]);
      }
    }
    input_row += input_row_pitch;
    grad_row += grad_row_pitch;
  }
  add_lane_sums(sum, COUNT * OC_BLOCK, partials);
}

// One row of the matrix: COUNT column indices at a time, then half as many, until none are left.
template <int OC_BLOCK, int COUNT, int TILE_COLS>
static inline void add_block_row(const float* input, int64_t input_row_pitch, const float* const grad[OC_BLOCK],
                                 int64_t grad_row_pitch, const int32_t* offsets, int count, float* partials) {
  for (; count >= COUNT; count -= COUNT, offsets += COUNT, partials += COUNT * OC_BLOCK)
    add_indices<OC_BLOCK, COUNT, TILE_COLS>(input, input_row_pitch, grad, grad_row_pitch, offsets, partials);
  if constexpr (COUNT > 1)
    add_block_row<OC_BLOCK, COUNT / 2, TILE_COLS>(input, input_row_pitch, grad, grad_row_pitch, offsets, count,
                                                  partials);
}

// Collects a vector per weight of an oc_block of 1 and, whenever kLanes of them are full, adds their lane sums to the
// partial sums: about three instructions per weight. A vector of partial sums per weight instead would be loaded and
// stored for each tile, 128 bytes, and took 11.2 ms instead of 8.3 for 512 channels at 4x4.
class LaneSums {
 public:
  explicit LaneSums(float* partials) : partials_(partials) {}
  int free_slots() const { return kLanes - filled_; }
  void push(Vec v) { store(vectors_ + filled_++ * kLanes, v); }
  void flush() {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(vectors_ + i * kLanes);
    add_lane_sums(v, filled_, partials_);
    partials_ += filled_;
    filled_ = 0;
  }

 private:
  float* partials_;
  int filled_ = 0;
  alignas(64) float vectors_[kLanes * kLanes] = {};
};

// One column index of an oc_block of 1: the sum over ROWS x COLS vectors of its input times the gradient g.
// COLUMN_OFFSET is 0, or -1 or 1 for a column index that reads the column before or after each position: these are
// shifted from aligned vectors, and 0 is shifted in at both ends of a row.
template <int ROWS, int COLS, int COLUMN_OFFSET>
static inline __attribute__((always_inline)) Vec multiply(const float* at, int64_t row_pitch, const Vec* g) {
  Vec partial[4] = {};  // independent sums hide the latency of a multiply-add
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    Vec beside = broadcast(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < COLS; ++i) {
      const int c = COLUMN_OFFSET > 0 ? COLS - 1 - i : i, q = r * COLS + c;
      const float* p = at + c * kLanes;
      Vec x = load(p);
      if constexpr (COLUMN_OFFSET != 0) x = in_register(x);
      const Vec shifted = COLUMN_OFFSET < 0   ? one_before(p, beside, x)
                          : COLUMN_OFFSET > 0 ? one_after(p, x, beside)
                                              : x;
      beside = x;
      partial[q % 4] = fma(shifted, g[q], partial[q % 4]);
    }
    if (r + 1 < ROWS) at = in_register(at + row_pitch);
  }
  return add(add(partial[0], partial[1]), add(partial[2], partial[3]));
}

template <int ROWS, int COLS, int COLUMN_OFFSET>
static inline __attribute__((always_inline)) void multiply_all(const float* input, int64_t row_pitch, const Vec* g,
                                                               const int32_t* offsets, int count, LaneSums& sums) {
  input -= COLUMN_OFFSET;
  for (int i = 0; i < count;) {
    const int end = count - i < sums.free_slots() ? count : i + sums.free_slots();
    for (; i < end; ++i) sums.push(multiply<ROWS, COLS, COLUMN_OFFSET>(in_register(input + offsets[i]), row_pitch, g));
    if (sums.free_slots() == 0) sums.flush();
  }
}

// One row of the matrix and a register block, ROWS x COLS vectors of the gradient, which stay in registers.
template <int ROWS, int COLS>
static inline __attribute__((always_inline)) void add_channel_row(const float* input, int64_t row_pitch,
                                                                  const float* grad, int64_t grad_row_pitch,
                                                                  const int32_t* offsets, int count,
                                                                  const int32_t* column_splits, LaneSums& sums) {
  Vec g[ROWS * COLS];
#pragma GCC unroll 16
  for (int q = 0; q < ROWS * COLS; ++q) g[q] = load(grad + q / COLS * grad_row_pitch + q % COLS * kLanes);
  if (!column_splits) return multiply_all<ROWS, COLS, 0>(input, row_pitch, g, offsets, count, sums);
  const int before = column_splits[0], same = column_splits[1];
  multiply_all<ROWS, COLS, -1>(input, row_pitch, g, offsets, before, sums);
  multiply_all<ROWS, COLS, 0>(input, row_pitch, g, offsets + before, same - before, sums);
  multiply_all<ROWS, COLS, 1>(input, row_pitch, g, offsets + same, count - same, sums);
}

// The gradient of channel j of an oc_block. Beyond the last channel of a group the block's first one will do: those
// partial sums are never read.
static inline const float* grad_of_channel(const GradWeightTile& tile, const int32_t* channels_of_block, int j) {
  return tile.grad + channels_of_block[channels_of_block[j] < 0 ? 0 : j] * tile.grad_channel_pitch;
}

// An oc_block of 2 or 4: each row of the matrix is multiplied by the whole tile at once.
template <int OC_BLOCK, int TILE_COLS>
static void tile_of_blocks(const PackedWeights& weights, Range ic_blocks, const GradWeightTile& tile, float* partials) {
  for (int64_t ic_block = ic_blocks.begin; ic_block < ic_blocks.end; ++ic_block) {
    const int32_t* row_offsets = weights.row_offsets + ic_block * weights.oc_blocks;
    for (int64_t i = tile.oc_blocks.begin; i < tile.oc_blocks.end; ++i) {
      const float* grad[OC_BLOCK];
      for (int j = 0; j < OC_BLOCK; ++j) grad[j] = grad_of_channel(tile, tile.channel_of + i * OC_BLOCK, j);
      add_block_row<OC_BLOCK, kLanes / OC_BLOCK, TILE_COLS>(
          tile.input, tile.input_row_pitch, grad, tile.grad_row_pitch, weights.input_offsets + row_offsets[i],
          row_offsets[i + 1] - row_offsets[i], partials + static_cast<int64_t>(row_offsets[i]) * OC_BLOCK);
    }
  }
}

// An oc_block of 1: as many vectors of the gradient at a time as there are registers for it. The lane sums of an
// ic_block run on from one row of the matrix to the next.
template <int TILE_COLS>
static void tile_of_channels(const PackedWeights& weights, Range ic_blocks, const GradWeightTile& tile,
                             float* partials) {
  constexpr int kCols = kAccumulators < TILE_COLS ? kAccumulators : TILE_COLS;
  for (int block = 0; block < kTileVectors; block += kAccumulators) {
    const int row = block / TILE_COLS, col = block % TILE_COLS * kLanes;
    const float* input = tile.input + row * tile.input_row_pitch + col;
    for (int64_t ic_block = ic_blocks.begin; ic_block < ic_blocks.end; ++ic_block) {
      const int64_t first_row = ic_block * weights.oc_blocks;
      const int32_t* row_offsets = weights.row_offsets + first_row;
      LaneSums sums(partials + row_offsets[tile.oc_blocks.begin]);
      for (int64_t i = tile.oc_blocks.begin; i < tile.oc_blocks.end; ++i)
        add_channel_row<kAccumulators / kCols, kCols>(
            input, tile.input_row_pitch,
            grad_of_channel(tile, tile.channel_of + i, 0) + row * tile.grad_row_pitch + col, tile.grad_row_pitch,
            weights.input_offsets + row_offsets[i], row_offsets[i + 1] - row_offsets[i],
            weights.column_splits ? weights.column_splits + 2 * (first_row + i) : nullptr, sums);
      sums.flush();
    }
  }
}

template <int OC_BLOCK, int TILE_COLS>
static void tile_of(const PackedWeights& weights, Range ic_blocks, const GradWeightTile& tile, float* partials) {
  if constexpr (OC_BLOCK == 1)
    tile_of_channels<TILE_COLS>(weights, ic_blocks, tile, partials);
  else
    tile_of_blocks<OC_BLOCK, TILE_COLS>(weights, ic_blocks, tile, partials);
}

template <int OC_BLOCK>
static void tile_of(const PackedWeights& weights, Range ic_blocks, const GradWeightTile& tile, float* partials) {
  if (tile.cols == 16) return tile_of<OC_BLOCK, 16>(weights, ic_blocks, tile, partials);
  if (tile.cols == 8) return tile_of<OC_BLOCK, 8>(weights, ic_blocks, tile, partials);
  if (tile.cols == 4) return tile_of<OC_BLOCK, 4>(weights, ic_blocks, tile, partials);
  if (tile.cols == 2) return tile_of<OC_BLOCK, 2>(weights, ic_blocks, tile, partials);
  return tile_of<OC_BLOCK, 1>(weights, ic_blocks, tile, partials);
}

void masked_conv2d_grad_weight_tile(const PackedWeights& weights, Range ic_blocks, const GradWeightTile& tile,
                                    float* partials) {
  if (weights.oc_block == 4) return tile_of<4>(weights, ic_blocks, tile, partials);
  if (weights.oc_block == 2) return tile_of<2>(weights, ic_blocks, tile, partials);
  return tile_of<1>(weights, ic_blocks, tile, partials);
}

}  // namespace SPARSE_ADV_ISA
}  // namespace sparse_adv
