// The arithmetic of grad_weight: one tile of positions, all weights kept by the mask.
#pragma once

#include <cstdint>

#include "common/range.h"
#include "cpu/capability.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

// A tile of kTileVectors vectors, `cols` of them per row. `grad` has a plane per output channel, without padding; those
// of other oc_blocks than `oc_blocks` are not read. All pitches in floats.
struct GradWeightTile {
  const float* input;  // at the tile's first vector, `grad` likewise
  const float* grad;
  int64_t input_row_pitch, grad_row_pitch, grad_channel_pitch;
  int cols;
  Range oc_blocks;            // those that are computed
  const int32_t* channel_of;  // [oc_blocks * oc_block]: the output channel, -1 beyond the end of a group
};

// For the column indices i of `ic_blocks` and of the tile's oc_blocks, and each channel j of their oc_block:
//   partials[i][j] += sum over the tile's positions and lanes of input[input_offsets[i] + position] * grad[j]
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_grad_weight_tile(const PackedWeights& weights, Range ic_blocks,
                                                            const GradWeightTile& tile, float* partials));

}  // namespace sparse_adv
