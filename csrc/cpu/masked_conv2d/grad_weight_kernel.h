// The arithmetic of grad_weight: one tile of positions, all weights kept by the mask.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/masked_conv2d/conv_kernel.h"

namespace sparse_adv {

// A tile of kTileVectors vectors, `cols` of them per row. `grad` has a plane per output channel, without padding. All
// pitches in floats.
struct GradWeightTile {
  const float* input;  // at the tile's first vector, `grad` likewise
  const float* grad;
  int64_t input_row_pitch, grad_row_pitch, grad_channel_pitch;
  int cols;
  const int32_t* channel_of;  // [oc_blocks * oc_block]: the output channel, -1 beyond the end of a group
};

// For the column indices i of the ic_blocks from `first_ic_block` on, up to `last_ic_block` - 1, and each channel j of
// their oc_block:
//   partials[i][j] += sum over the tile's positions and lanes of input[input_offsets[i] + position] * grad[j]
SPARSE_ADV_FOR_EACH_ISA(void masked_conv2d_grad_weight_tile(const PackedWeights& weights, int64_t first_ic_block,
                                                            int64_t last_ic_block, const GradWeightTile& tile,
                                                            float* partials));

}  // namespace sparse_adv
